// Activations of the stage before: packets from the exchange into shared memory, by all consumer threads.
#pragma once
#include "packet.cuh"
#include "stages.cuh"

// Some neighbouring columns of every row on their way from L2: `fragments` of 16 columns, of rows of `cols` in all.
template <int cols, int fragments>
struct Fetch {
  static constexpr int row_threads = num_consumers / max_rows;  // the threads share the rows evenly
  static constexpr int num = ceil_div(fragments * 2, row_threads);
  static constexpr int batch = num < 8 ? num : 8;
  static constexpr int batches = ceil_div(num, batch);

  Vec16 packet[batch];
  int row;
  int at;     // this thread's first packet of the batch, from the first column on
  int valid;  // packets that are sent; beyond are the padding of a row and rows that do not exist
  const u8* source;
  u32 tag;

  __device__ __forceinline__ Fetch(const Cta& cta, const u8* buffer, u32 tag_, int first_fragment = 0) : tag(tag_) {
    row = cta.thread / row_threads;
    at = cta.thread % row_threads;
    const int row_packets = ceil_div(cols, 8) - first_fragment * 2;
    valid = row < cta.args.num_rows ? min(row_packets, fragments * 2) : 0;
    source = buffer + row * x_row_bytes(cols) + first_fragment * 32;
  }
  __device__ __forceinline__ int packet_idx(int j) const { return at + j * row_threads; }
  __device__ __forceinline__ void issue() {
#pragma unroll
    for (int j = 0; j < batch; ++j) {
      packet[j] = Vec16{};
      if (packet_idx(j) < valid) packet[j] = ld_relaxed_gpu_b128(source + packet_idx(j) * 16);
    }
  }
  // Polls until all are there.
  __device__ __forceinline__ void await(const Cta& cta) {
    const Stopwatch stopwatch(cta, WaitKind::packet);
    Patience patience;
    bool complete;
    do {
      complete = true;
#pragma unroll
      for (int j = 0; j < batch; ++j) {
        if (packet_idx(j) < valid && !arrived<Payload::half>(packet[j], tag)) {
          packet[j] = ld_relaxed_gpu_b128(source + packet_idx(j) * 16);
          complete = false;
        }
      }
    } while (!complete && !patience.ends(cta.args, cta.shared, WaitKind::packet));
  }
  // x: [max_rows] rows of `stride` bytes. The padding columns become zeros; rows that do not exist are left alone.
  __device__ __forceinline__ void store(const Cta& cta, u8* x, u32 stride) const {
    if (row >= cta.args.num_rows) return;
#pragma unroll
    for (int j = 0; j < batch; ++j) {
      if (packet_idx(j) < fragments * 2) *reinterpret_cast<Vec16*>(x + row * stride + packet_idx(j) * 16) = packet[j];
    }
  }
  __device__ __forceinline__ void next_batch() { at += batch * row_threads; }
};

// The weights of the norm that belong to one of a thread's packets: eight columns, zero beyond the last one.
struct NormWeights {
  float4 lo{};
  float4 hi{};

  __device__ __forceinline__ void load(const float* weights, int packet, bool valid) {
    if (!valid) return;
    lo = reinterpret_cast<const float4*>(weights)[2 * packet];
    hi = reinterpret_cast<const float4*>(weights)[2 * packet + 1];
  }
};

__device__ __forceinline__ u32 multiply_pair(u32 pair, float lo_weight, float hi_weight, float& squares) {
  float lo, hi;
  unpack_x(pair, lo, hi);
  squares = fmaf(lo, lo, squares);
  squares = fmaf(hi, hi, squares);
  return pack_x(lo * lo_weight, hi * hi_weight);
}

// Hidden state -> input of a matrix behind a norm, but for 1 / rms, which is a factor of the sums.
__device__ __forceinline__ void normalise(Vec16& packet, const NormWeights& weights, float& squares) {
  packet.w[0] = multiply_pair(packet.w[0], weights.lo.x, weights.lo.y, squares);
  packet.w[1] = multiply_pair(packet.w[1], weights.lo.z, weights.lo.w, squares);
  packet.w[2] = multiply_pair(packet.w[2], weights.hi.x, weights.hi.y, squares);
  packet.w[3] = multiply_pair(packet.w[3], weights.hi.z, weights.hi.w, squares);
}

// 1 / rms from the sum of squares of a row.
__device__ __forceinline__ float rstd_of(float squares) {
  return rsqrtf(squares / config::hidden_size + config::rms_norm_eps);
}

// All of a stage's activations. They take the place of those of the stage before, which every warp must have left.
template <int cols>
__device__ __forceinline__ void load_x(const Cta& cta, const u8* buffer, u32 tag) {
  using Row = Fetch<cols, padded(cols) / 16>;
  Row fetch(cta, buffer, tag);
#pragma unroll
  for (int i = 0; i < Row::batches; ++i) {
    fetch.issue();
    fetch.await(cta);
    if (i == 0) cta.consumer_sync();
    fetch.store(cta, cta.x, x_row_stride(cols));
    fetch.next_batch();
  }
  cta.consumer_sync();
}

// The same for the input of a matrix behind a norm, from the hidden state. Squares are added as eight warps a row would:
// packet i belongs to warp i / 32 % 8, whether there are as many or one warp does the work of several.
__device__ __forceinline__ void load_normed_x(const Cta& cta, const u8* buffer, u32 tag, u64 norm_offset) {
  constexpr int cols = config::hidden_size;
  using Row = Fetch<cols, padded(cols) / 16>;
  constexpr int row_warps = Row::row_threads / 32;
  constexpr int num = num_consumer_warps / row_warps;  // warps that this one stands for
  const float* norm = vector_at(cta, norm_offset);
  float squares[num] = {};
  const int row = cta.thread / Row::row_threads;
  if constexpr (Row::num <= 2) {  // few enough packets for their weights to arrive before them
    Row fetch(cta, buffer, tag);
    NormWeights weights[Row::num];
    fetch.issue();
#pragma unroll
    for (int j = 0; j < Row::num; ++j) weights[j].load(norm, fetch.packet_idx(j), fetch.packet_idx(j) < fetch.valid);
    fetch.await(cta);
    cta.consumer_sync();
#pragma unroll
    for (int j = 0; j < Row::num; ++j) normalise(fetch.packet[j], weights[j], squares[j % num]);
    fetch.store(cta, cta.x, x_row_stride(cols));
  } else {
    load_x<cols>(cta, buffer, tag);
    u8* x = cta.x + row * x_row_stride(cols);
    const int end = row < cta.args.num_rows ? ceil_div(cols, 8) : 0;
#pragma unroll 1
    for (int first = cta.thread % Row::row_threads; first < end; first += Row::row_threads * num) {
#pragma unroll
      for (int j = 0; j < num; ++j) {
        const int packet = first + j * Row::row_threads;
        if (packet >= end) break;
        NormWeights weights;
        weights.load(norm, packet, true);
        Vec16 values = *reinterpret_cast<const Vec16*>(x + packet * 16);
        normalise(values, weights, squares[j]);
        *reinterpret_cast<Vec16*>(x + packet * 16) = values;
      }
    }
  }
  const int warp = cta.thread % Row::row_threads / 32;
#pragma unroll
  for (int j = 0; j < num; ++j) {
    const float sum = warp_sum(squares[j]);
    if (cta.lane == 0) cta.shared.squares[row][warp + j * row_warps] = sum;
  }
  cta.consumer_sync();
}
