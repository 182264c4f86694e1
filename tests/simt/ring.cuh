// The sampler reads nothing from the ring.
#pragma once
#include "cta.cuh"
