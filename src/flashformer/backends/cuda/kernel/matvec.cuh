// Tiles of 16 rows times the activations of 1 to 8 tokens, on the tensor cores.
//
// Weights are operand A in fragment order (quant/layout.py), tokens the 8 columns of operand B. The eight warps share
// a slot's columns; their sums are added in a fixed order, so a token's result depends neither on the other tokens
// nor on the time of day. An epilogue (one warp a tile, in turn) does with the 16 sums what the stage is for.
#pragma once
#include "packet.cuh"
#include "stages.cuh"

__device__ __forceinline__ void mma(float (&acc)[4], const Vec16& a, uint2 b) {
  if constexpr (config::weights_f16) {
    mma_f16(acc, a.w[0], a.w[1], a.w[2], a.w[3], b.x, b.y);
  } else {
    mma_bf16(acc, a.w[0], a.w[1], a.w[2], a.w[3], b.x, b.y);
  }
}

template <class Sink>
__device__ __forceinline__ void stream_tiles(Sink& sink, const Shape& shape, const u8* matrix) {
  const Windows windows(shape, sink.cta.args);
  for (int group = shape.begin; group < shape.end; group += windows.group) {
    for (int window = 0; window < windows.count; ++window) {
      for (int tile = group; tile < min(group + windows.group, shape.end); ++tile) {
        const u8* source = matrix + static_cast<u64>(tile) * shape.tile_bytes();
        const int end = min((window + 1) * windows.chunks, shape.num_chunks);
#pragma unroll 1
        for (int chunk = window * windows.chunks; chunk < end; ++chunk) {
          sink.fill(source + chunk * shape.chunk_fragments * 512, shape.chunk_size(chunk) * 512);
        }
      }
    }
  }
}

// Activations of the stage before, [rows][cols] in packets.
struct Input {
  const u8* source;
  int cols;
  u32 tag;
};

// Hides from the compiler that a value never changes: what is derived from it is computed where it is used instead
// of being kept in registers from one layer to the next.
__device__ __forceinline__ int recomputed(int v) {
  asm volatile("" : "+r"(v));
  return v;
}

// This thread's packets of some columns of its row, on their way from L2.
struct Fetch {
  static constexpr int batch = 8;
  Vec16 packet[batch];
  const u8* source;  // of the row's first column
  u8* target;
  int at;     // this thread's first packet
  int end;    // past the last one of the columns
  int valid;  // packets of a row; the padding beyond is never sent
  int step;   // from one of a thread's packets to its next
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
    valid = min(end, (input.cols + 7) / 8);
    source = input.source + row * x_row_bytes(input.cols);
    target = x + row * row_stride - first_fragment * 32;
  }
  __device__ __forceinline__ void issue() {
#pragma unroll
    for (int j = 0; j < batch; ++j) {
      packet[j] = Vec16{};
      if (at + j * step < valid) packet[j] = ld_relaxed_gpu_b128(source + (at + j * step) * 16);
    }
  }
  __device__ __forceinline__ void store(const Cta& cta) {
    const Stopwatch stopwatch(cta, WaitKind::packet);
    Patience patience;
    bool complete;
    do {
      complete = true;
#pragma unroll
      for (int j = 0; j < batch; ++j) {
        if (at + j * step < valid && !arrived<Payload::half>(packet[j], tag)) {
          packet[j] = ld_relaxed_gpu_b128(source + (at + j * step) * 16);
          complete = false;
        }
      }
    } while (!complete && !patience.ends(cta.args, cta.shared, WaitKind::packet));
#pragma unroll
    for (int j = 0; j < batch; ++j) {
      if (at + j * step < end) *reinterpret_cast<Vec16*>(target + (at + j * step) * 16) = packet[j];
    }
  }
};

__device__ __forceinline__ void load_x(const Cta& cta, const Input& input, int fragments) {
  Fetch fetch(cta, input, 0, fragments, cta.x, x_row_stride(input.cols));
#pragma unroll 1
  while (fetch.at < fetch.end) {
    fetch.issue();
    fetch.store(cta);
    fetch.at += fetch.step * Fetch::batch;
  }
}

constexpr int warp_fragments = config::slot_bytes / 512 / num_consumer_warps;

// One slot of weights times this warp's columns. x: the lane's part of operand B at the chunk's first column.
__device__ __forceinline__ void multiply_chunk(const Cta& cta, RingReader& ring, float (&acc)[2][4], const u8* x,
                                               int count) {
  const int first = cta.warp * warp_fragments;
  const bool active = cta.lane / 4 < cta.args.num_rows;
  uint2 b[warp_fragments];
#pragma unroll
  for (int j = 0; j < warp_fragments; ++j) {
    b[j] = make_uint2(0, 0);
    if (active && first + j < count) b[j] = *reinterpret_cast<const uint2*>(x + (first + j) * 32);
  }
  const u8* slot = ring.wait() + cta.lane * 16;
#pragma unroll
  for (int j = 0; j < warp_fragments; ++j) {
    if (first + j < count) mma(acc[j % 2], *reinterpret_cast<const Vec16*>(slot + (first + j) * 512), b[j]);
  }
  ring.release();
}

// Sums of the warps for one tile, in order, then the epilogue by one warp; two buffers, so one sync a tile.
// epilogue(tile, row, token, i, sum): lane % 16 = row, token = lane / 16 + 2 i; all lanes call it, also for
// a token equal to num_rows.
template <class Epilogue>
__device__ __forceinline__ void finish_tile(const Cta& cta, const float (&acc)[2][4], int tile, u32& buffer,
                                            Epilogue& epilogue) {
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
  cta.delay(tile);
#pragma unroll 1
  for (int i = 0; 2 * i < num_rows; ++i) {
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

// All of a CTA's tiles; the activations lie complete in shared memory. `late` is stored before the first epilogue.
template <class Late, class Epilogue>
__device__ __forceinline__ void matvec(const Cta& cta, RingReader& ring, const Shape& shape, u32& buffer, Late& late,
                                       Epilogue& epilogue) {
  const int lane = recomputed(cta.lane);
  const u8* x = cta.x + lane / 4 * x_row_stride(shape.cols) + lane % 4 * 8;
#pragma unroll 1
  for (int tile = shape.begin; tile < shape.end; ++tile) {
    float acc[2][4] = {};
#pragma unroll 1
    for (int chunk = 0; chunk < shape.num_chunks; ++chunk) {
      multiply_chunk(cta, ring, acc, x + chunk * shape.chunk_fragments * 32, shape.chunk_size(chunk));
    }
    if (tile == shape.begin) late.store(cta);
    finish_tile(cta, acc, tile, buffer, epilogue);
  }
}

// The same with activations that come window by window; the next window is fetched while one is used.
template <class Epilogue>
__device__ __forceinline__ void matvec_windows(const Cta& cta, RingReader& ring, const Shape& shape,
                                               const Windows& windows, const Input& input, u32& buffer,
                                               Epilogue& epilogue) {
  const int window_fragments = windows.chunks * shape.chunk_fragments;
  const int stride = window_fragments * 32 + 32;
  const u32 window_bytes = stride * cta.args.num_rows;
  const u32 lane_offset = cta.lane / 4 * stride + cta.lane % 4 * 8;
#pragma unroll 1
  for (int group = shape.begin; group < shape.end; group += max_group) {
    float acc[max_group][2][4] = {};
#pragma unroll 1
    for (int window = -1; window < windows.count; ++window) {
      const int next = (window + 1) * window_fragments;
      Fetch fetch(cta, input, next, max(0, min(window_fragments, shape.fragments - next)),
                  cta.x + (window + 1) % 2 * window_bytes, stride);
      fetch.issue();
      const u8* x = cta.x + (window & 1) * window_bytes + lane_offset;
      const int first = window * windows.chunks;
      const int end = window < 0 ? first : min(first + windows.chunks, shape.num_chunks);
#pragma unroll
      for (int i = 0; i < max_group; ++i) {
        if (group + i >= shape.end) break;
#pragma unroll 1
        for (int chunk = first; chunk < end; ++chunk) {
          multiply_chunk(cta, ring, acc[i], x + (chunk - first) * shape.chunk_fragments * 32, shape.chunk_size(chunk));
        }
      }
      fetch.store(cta);
      cta.consumer_sync();
    }
#pragma unroll
    for (int i = 0; i < max_group; ++i) {
      if (group + i >= shape.end) break;
      finish_tile(cta, acc[i], group + i, buffer, epilogue);
    }
  }
}
