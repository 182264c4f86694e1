// The machine's read bandwidth: what the weights' stream is measured against.
#pragma once

#include <chrono>

#include "threads.h"

// Reads `bytes` at `data` over and over, `seconds` long, with plain vector loads: every CTA its own
// part, in four streams side by side (one stream alone does not fill the memory's queues). GB/s.
struct BandwidthTest {
  const u8* data;
  i64 bytes;
  double seconds;
  double gb_per_s = 0;
  std::atomic<i64> passes{0};
  i32 seen = 0;  // keeps the loads alive

  void run(Cta& cta) {
    using namespace simd;
    using Clock = std::chrono::steady_clock;
    constexpr int streams = 4;
    constexpr i64 line = 64, stretch = 64 << 10, piece = streams * stretch;
    constexpr int vectors = int(line / sizeof(I32));
    const i64 pieces = bytes / piece;
    const i64 first = pieces * cta.idx / cta.team.size(), end = pieces * (cta.idx + 1) / cta.team.size();
    I32 bits[streams] = {zero_i32(), zero_i32(), zero_i32(), zero_i32()};
    cta.sync();
    const auto start = Clock::now();
    i64 done = 0;
    for (i64 i = first; elapsed(start) < seconds; i = i + 1 < end ? i + 1 : first, ++done)
      for (i64 at = 0; at < stretch; at += line)
#pragma GCC unroll 4
        for (int s = 0; s < streams; ++s)
#pragma GCC unroll 4
          for (int v = 0; v < vectors; ++v)
            bits[s] = add_i32(bits[s], load_i32(data + i * piece + s * stretch + at + v * i64(sizeof(I32))));
    passes.fetch_add(done);
    cta.sync();
    if (cta.idx == 0) {
      gb_per_s = double(passes.load()) * double(piece) / elapsed(start) / 1e9;
      seen = sum_i32(add_i32(add_i32(bits[0], bits[1]), add_i32(bits[2], bits[3])));
    }
    cta.sync();
  }

  static double elapsed(std::chrono::steady_clock::time_point start) {
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  }
};
