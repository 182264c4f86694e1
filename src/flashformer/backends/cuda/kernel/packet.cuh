// Hand-offs between CTAs without barriers: 16-byte packets that say themselves whether they have arrived.
//
// A packet holds 8 16-bit values or 4 floats; the last value's lowest bit is the tag. Each place in the exchange is
// written once a layer, with tags 0, 1, 0, ... from the launch's start (the host fills the exchange with ones before).
// A reader polls until it sees the tag it expects. It can be at most one use behind the writer: a place is written
// again only by a CTA whose input depends, through the hand-offs between, on every reader of the last use
// (docs/cuda-kernel.md has the chain for each buffer). So one bit is enough, and no fence is needed: the packet is one
// single-copy atomic access.
#pragma once
#include "cta.cuh"

enum class Payload : u32 { half = 1u << 16, single = 1u };  // the tag's bit in the last word

template <Payload payload>
__device__ __forceinline__ void send_packet(void* at, Vec16 packet, u32 tag) {
  constexpr u32 bit = static_cast<u32>(payload);
  packet.w[3] = tag ? packet.w[3] | bit : packet.w[3] & ~bit;
  st_relaxed_gpu_b128(at, packet);
}

template <Payload payload>
__device__ __forceinline__ bool arrived(const Vec16& packet, u32 tag) {
  return ((packet.w[3] & static_cast<u32>(payload)) != 0) == (tag != 0);
}

// A value for which one bit is not enough, since its place is not written in every layer: it carries the number of the
// layer since the process started. Eight bytes are one single-copy atomic access, too.
__device__ __forceinline__ void send_dated(void* at, float value, u32 epoch) {
  st_relaxed_gpu_b64(at, __float_as_uint(value), epoch);
}

// Two neighbouring ones.
__device__ __forceinline__ void send_dated(void* at, float2 pair, u32 epoch) {
  st_relaxed_gpu_b128(at, {{__float_as_uint(pair.x), epoch, __float_as_uint(pair.y), epoch}});
}

__device__ __forceinline__ u64 load_dated(const void* at) { return ld_relaxed_gpu(static_cast<const u64*>(at)); }

// Poll again until the value is there.
__device__ __forceinline__ float await_dated(const Cta& cta, u64 dated, const void* at, u32 epoch) {
  const Stopwatch stopwatch(cta, WaitKind::packet);
  Patience patience;
  while (static_cast<u32>(dated >> 32) != epoch) {
    dated = load_dated(at);
    if (patience.ends(cta.args, cta.shared, WaitKind::packet)) break;
  }
  return __uint_as_float(static_cast<u32>(dated));
}

// Two neighbouring dated values.
__device__ __forceinline__ bool both_arrived(const Vec16& pair, u32 epoch) {
  return pair.w[1] == epoch && pair.w[3] == epoch;
}

// Poll again until the packet is there.
template <Payload payload>
__device__ __forceinline__ void await_packet(const Cta& cta, Vec16& packet, const void* at, u32 tag) {
  const Stopwatch stopwatch(cta, WaitKind::packet);
  Patience patience;
  while (!arrived<payload>(packet, tag)) {
    packet = ld_relaxed_gpu_b128(at);
    if (patience.ends(cta.args, cta.shared, WaitKind::packet)) return;
  }
}

__device__ __forceinline__ u32 pack_x(float lo, float hi) {
  if constexpr (config::weights_f16) return cvt_f16x2(lo, hi);
  return cvt_bf16x2(lo, hi);
}

__device__ __forceinline__ void unpack_x(u32 pair, float& lo, float& hi) {
  if constexpr (config::weights_f16) {
    lo = cvt_f32_f16(static_cast<u16>(pair));
    hi = cvt_f32_f16(static_cast<u16>(pair >> 16));
  } else {
    lo = __uint_as_float(pair << 16);
    hi = __uint_as_float(pair & 0xffff0000u);
  }
}

// Eight neighbouring lanes hold eight neighbouring elements; the first of them sends the packet. All lanes call.
__device__ __forceinline__ void send_halves(const Cta& cta, u8* at, float value, u32 tag, bool valid) {
  Vec16 packet;
  packet.w[0] = pack_x(value, __shfl_down_sync(~0u, value, 1));
#pragma unroll
  for (int i = 1; i < 4; ++i) packet.w[i] = __shfl_down_sync(~0u, packet.w[0], 2 * i);
  if (valid && cta.lane % 8 == 0) send_packet<Payload::half>(at, packet, tag);
}

// The same for four neighbouring lanes with two elements each.
__device__ __forceinline__ void send_half_pairs(const Cta& cta, u8* at, float2 pair, u32 tag, bool valid) {
  Vec16 packet;
  packet.w[0] = pack_x(pair.x, pair.y);
#pragma unroll
  for (int i = 1; i < 4; ++i) packet.w[i] = __shfl_down_sync(~0u, packet.w[0], i);
  if (valid && cta.lane % 4 == 0) send_packet<Payload::half>(at, packet, tag);
}

// Four neighbouring lanes, four floats.
__device__ __forceinline__ void send_singles(const Cta& cta, float* at, float value, u32 tag, bool valid) {
  Vec16 packet;
  packet.w[0] = __float_as_uint(value);
#pragma unroll
  for (int i = 1; i < 4; ++i) packet.w[i] = __shfl_down_sync(~0u, packet.w[0], i);
  if (valid && cta.lane % 4 == 0) send_packet<Payload::single>(at, packet, tag);
}
