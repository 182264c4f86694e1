// Tiles of 16 rows times the activations of 1 to 8 tokens, on the tensor cores.
//
// Weights are operand A in fragment order (quant/layout.py), tokens the 8 columns of operand B. The eight warps share
// a slot's columns; their sums are added in a fixed order, so a token's result depends neither on the other tokens
// nor on the time of day. An epilogue (one warp a tile, in turn) does with the 16 sums what the stage is for.
#pragma once
#include "packet.cuh"
#include "ring.cuh"

__device__ constexpr int padded(int cols) { return (cols + 15) / 16 * 16; }
__device__ constexpr u32 x_row_bytes(int cols) { return padded(cols) * 2; }
__device__ constexpr u32 x_row_stride(int cols) { return padded(cols) * 2 + 32; }  // +32: tokens on different banks

__device__ __forceinline__ void mma(float (&acc)[4], const Vec16& a, uint2 b) {
  if constexpr (config::weights_f16) {
    mma_f16(acc, a.w[0], a.w[1], a.w[2], a.w[3], b.x, b.y);
  } else {
    mma_bf16(acc, a.w[0], a.w[1], a.w[2], a.w[3], b.x, b.y);
  }
}

// A matrix as one CTA sees it: its own tiles, and how a tile is cut into chunks that fit a slot.
template <int cols>
struct Tiles {
  static constexpr int fragments = padded(cols) / 16;  // of a tile, 512 bytes each
  static constexpr int fragments_a_slot = config::slot_bytes / 512;
  static constexpr int num_chunks = (fragments + fragments_a_slot - 1) / fragments_a_slot;
  static constexpr int chunk_fragments = (fragments + num_chunks - 1) / num_chunks;  // of all chunks but the last
  static constexpr u32 tile_bytes = fragments * 512;
  static constexpr int warp_fragments = (chunk_fragments + num_consumer_warps - 1) / num_consumer_warps;

  int begin;
  int end;

  // Contiguous, as even as whole tiles allow: the rule of plan/tiles.py.
  __device__ Tiles(int cta_idx, int num_tiles)
      : begin(static_cast<int>(static_cast<long long>(num_tiles) * cta_idx / config::num_ctas)),
        end(static_cast<int>(static_cast<long long>(num_tiles) * (cta_idx + 1) / config::num_ctas)) {}
};

// The threads share the rows evenly: log2 of the threads that fetch one row.
__device__ __forceinline__ int row_threads_log2(int num_rows) {
  return 8 - (num_rows > 4 ? 3 : num_rows > 2 ? 2 : num_rows > 1 ? 1 : 0);
}
static_assert(num_consumers == 256 && max_rows == 8, "row_threads_log2 counts on it");

// Activations too wide for shared memory come in windows of whole chunks; each is used for all of a CTA's tiles
// (at most max_group at a time) before the next. The producer walks the same order.
constexpr int max_group = 4;

template <int cols>
struct Windows {
  int chunks;  // of one window
  int count;
  int group;   // tiles that share a pass over the windows

  __device__ explicit Windows(const StepArgs& args) {
    using T = Tiles<cols>;
    if (args.num_rows * x_row_stride(cols) <= args.x_bytes) {
      chunks = T::num_chunks;
      count = 1;
      group = 1;
    } else {
      // Two windows, one is read while one is filled; a window is one batch of packets for every thread.
      const int row_bytes = min(args.x_bytes / 2 / args.num_rows - 32, 128u << row_threads_log2(args.num_rows));
      chunks = row_bytes / (T::chunk_fragments * 32);
      count = (T::num_chunks + chunks - 1) / chunks;
      group = max_group;
    }
  }
};

template <int cols>
__device__ __forceinline__ int chunk_size(int chunk) {
  using T = Tiles<cols>;
  return min(T::chunk_fragments, T::fragments - chunk * T::chunk_fragments);
}

template <int cols, class Sink>
__device__ __forceinline__ void stream_tiles(Sink& ring, const Tiles<cols>& tiles, const u8* matrix) {
  using T = Tiles<cols>;
  const Windows<cols> windows(ring.cta.args);
  for (int group = tiles.begin; group < tiles.end; group += windows.group) {
    for (int window = 0; window < windows.count; ++window) {
      for (int tile = group; tile < min(group + windows.group, tiles.end); ++tile) {
        const u8* source = matrix + static_cast<u64>(tile) * T::tile_bytes;
        const int end = min((window + 1) * windows.chunks, T::num_chunks);
        for (int chunk = window * windows.chunks; chunk < end; ++chunk) {
          ring.fill(source + chunk * T::chunk_fragments * 512, chunk_size<cols>(chunk) * 512);
        }
      }
    }
  }
}

// Activations of the stage before, [rows][cols] in packets.
struct Input {
  const u8* source;
  u32 tag;
};

// Hides from the compiler that a value never changes: what is derived from it is computed where it is used instead
// of being kept in registers from one layer to the next.
__device__ __forceinline__ int recomputed(int v) {
  asm volatile("" : "+r"(v));
  return v;
}

// This thread's packets of some columns of its row, on their way from L2.
template <int cols>
struct Fetch {
  static constexpr int batch = 8;
  static constexpr int valid_packets = (cols + 7) / 8;  // of a row; the padding beyond is never sent
  Vec16 packet[batch];
  const u8* source;  // of the row's first column
  u8* target;
  int at;    // this thread's first packet
  int end;   // past the last one of the columns
  int step;  // from one of a thread's packets to its next
  u32 tag;

  __device__ __forceinline__ Fetch(const Cta& cta, const Input& input, int first_fragment, int num_fragments, u8* x,
                                   int row_stride)
      : tag(input.tag) {
    const int log2 = row_threads_log2(cta.args.num_rows);
    const int thread = recomputed(cta.thread);
    const int row = thread >> log2;
    step = 1 << log2;
    at = first_fragment * 2 + (thread & (step - 1));
    end = row < cta.args.num_rows ? (first_fragment + num_fragments) * 2 : 0;
    source = input.source + row * x_row_bytes(cols);
    target = x + row * row_stride - first_fragment * 32;
  }
  __device__ __forceinline__ bool exists(int j) const { return at + j * step < min(end, valid_packets); }

  __device__ __forceinline__ void issue() {
#pragma unroll
    for (int j = 0; j < batch; ++j) {
      packet[j] = Vec16{};
      if (exists(j)) packet[j] = ld_relaxed_gpu_b128(source + (at + j * step) * 16);
    }
  }
  __device__ __forceinline__ void store(const Cta& cta) {
    Patience patience;
    bool complete;
    do {
      complete = true;
#pragma unroll
      for (int j = 0; j < batch; ++j) {
        if (exists(j) && !arrived<Payload::half>(packet[j], tag)) {
          packet[j] = ld_relaxed_gpu_b128(source + (at + j * step) * 16);
          complete = false;
        }
      }
    } while (!complete && !patience.ends(cta.args, cta.shared, WaitKind::packet));
#pragma unroll
    for (int j = 0; j < batch; ++j) {
      const int i = at + j * step;
      if (i < end) *reinterpret_cast<Vec16*>(target + i * 16) = packet[j];
    }
  }
};

template <int cols>
__device__ __forceinline__ void load_x(const Cta& cta, const Input& input) {
  Fetch<cols> fetch(cta, input, 0, Tiles<cols>::fragments, cta.x, x_row_stride(cols));
  while (fetch.at < fetch.end) {
    fetch.issue();
    fetch.store(cta);
    fetch.at += fetch.step * Fetch<cols>::batch;
  }
}

// One slot of weights times this warp's columns. x: the lane's part of operand B at the chunk's first column.
template <int cols>
__device__ __forceinline__ void multiply_chunk(const Cta& cta, RingReader& ring, float (&acc)[2][4], const u8* x,
                                               int count) {
  constexpr int n = Tiles<cols>::warp_fragments;
  const int first = cta.warp * n;
  const bool active = cta.lane / 4 < cta.args.num_rows;
  uint2 b[n];
#pragma unroll
  for (int j = 0; j < n; ++j) {
    b[j] = make_uint2(0, 0);
    if (active && first + j < count) b[j] = *reinterpret_cast<const uint2*>(x + (first + j) * 32);
  }
  const u8* slot = ring.wait() + cta.lane * 16;
#pragma unroll
  for (int j = 0; j < n; ++j) {
    if (first + j < count) mma(acc[j % 2], *reinterpret_cast<const Vec16*>(slot + (first + j) * 512), b[j]);
  }
  ring.release();
}

// Sums of the warps for one tile, in order, then the epilogue by one warp; two buffers, so one sync a tile.
// Epilogue(tile, row, token, i, sum): lane % 16 = row, token = lane / 16 + 2 i; all lanes call it, also for
// a token equal to num_rows.
template <class Epilogue>
__device__ __forceinline__ void finish_tile(const Cta& cta, const float (&acc)[2][4], int tile, u32& buffer,
                                            Epilogue&& epilogue) {
  const int num_rows = cta.args.num_rows;
  buffer ^= 1;
  float* red = cta.shared.red[buffer][cta.warp];
  const int lane = recomputed(cta.lane);
  const int row = lane / 4;
  const int token = lane % 4 * 2;
  if (token < num_rows) {
    red[token * red_stride + row] = acc[0][0] + acc[1][0];
    red[token * red_stride + row + 8] = acc[0][2] + acc[1][2];
  }
  if (token + 1 < num_rows) {
    red[(token + 1) * red_stride + row] = acc[0][1] + acc[1][1];
    red[(token + 1) * red_stride + row + 8] = acc[0][3] + acc[1][3];
  }
  cta.consumer_sync();
  if (cta.warp != tile % num_consumer_warps) return;
#pragma unroll
  for (int i = 0; i < max_rows / 2; ++i) {
    if (2 * i >= num_rows) break;
    const int t = lane / 16 + 2 * i;
    float sum = 0;
    if (t < num_rows) {
#pragma unroll
      for (int w = 0; w < num_consumer_warps; ++w) {
        sum += cta.shared.red[buffer][w][t * red_stride + lane % 16];
      }
    }
    epilogue(tile, lane % 16, t, i, sum);
  }
}

// All of a CTA's tiles; the activations lie complete in shared memory.
template <int cols, class Epilogue>
__device__ __forceinline__ void matvec(const Cta& cta, RingReader& ring, const Tiles<cols>& tiles, u32& buffer,
                                       Epilogue&& epilogue) {
  using T = Tiles<cols>;
  const int lane = recomputed(cta.lane);
  const u8* x = cta.x + lane / 4 * x_row_stride(cols) + lane % 4 * 8;
  for (int tile = tiles.begin; tile < tiles.end; ++tile) {
    float acc[2][4] = {};
    for (int chunk = 0; chunk < T::num_chunks; ++chunk) {
      multiply_chunk<cols>(cta, ring, acc, x + chunk * T::chunk_fragments * 32, chunk_size<cols>(chunk));
    }
    finish_tile(cta, acc, tile, buffer, epilogue);
  }
}

// The same with activations that come window by window; the next window is fetched while one is used.
template <int cols, class Epilogue>
__device__ __forceinline__ void matvec_windows(Cta& cta, RingReader& ring, const Tiles<cols>& tiles, const Windows<cols>& windows,
                               const Input& input, u32& buffer, Epilogue&& epilogue) {
  using T = Tiles<cols>;
  const int stride = windows.chunks * T::chunk_fragments * 32 + 32;
  const u32 window_bytes = stride * cta.args.num_rows;
  const u32 lane_offset = cta.lane / 4 * stride + cta.lane % 4 * 8;
  auto fragments_of = [&](int window) {
    return min(windows.chunks * T::chunk_fragments, T::fragments - window * windows.chunks * T::chunk_fragments);
  };
  for (int group = tiles.begin; group < tiles.end; group += max_group) {
    float acc[max_group][2][4] = {};
    {
      Fetch<cols> fetch(cta, input, 0, fragments_of(0), cta.x, stride);
      fetch.issue();
      fetch.store(cta);
    }
    cta.consumer_sync();
    cta.trace();
    for (int window = 0; window < windows.count; ++window) {
      Fetch<cols> fetch(cta, input, (window + 1) * windows.chunks * T::chunk_fragments,
                        window + 1 < windows.count ? fragments_of(window + 1) : 0,
                        cta.x + (window + 1) % 2 * window_bytes, stride);
      fetch.issue();
      const u8* x = cta.x + window % 2 * window_bytes + lane_offset;
      const int first = window * windows.chunks;
      const int end = min(first + windows.chunks, T::num_chunks);
#pragma unroll
      for (int i = 0; i < max_group; ++i) {
        if (group + i >= tiles.end) break;
        for (int chunk = first; chunk < end; ++chunk) {
          multiply_chunk<cols>(cta, ring, acc[i], x + (chunk - first) * T::chunk_fragments * 32,
                               chunk_size<cols>(chunk));
        }
      }
      fetch.store(cta);
      cta.consumer_sync();
    }
#pragma unroll
    for (int i = 0; i < max_group; ++i) {
      if (group + i >= tiles.end) break;
      finish_tile(cta, acc[i], group + i, buffer, epilogue);
    }
  }
}
