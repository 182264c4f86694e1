// Activations of the stage before: packets from the exchange into shared memory, by all consumer threads.
#pragma once
#include "packet.cuh"
#include "stages.cuh"

// Some neighbouring columns of every row on their way from L2: `packets` of 8 columns, of rows of `cols` in all. A
// thread takes the same columns of every row.
template <int cols, int packets>
struct Fetch {
  static constexpr int num = ceil_div(packets, num_consumers);  // packets of a thread in a row
  static constexpr int most = max_rows < 12 ? 12 / max_rows : 1;      // that its registers hold
  static constexpr int batch = num < most ? num : most;
  static constexpr int batches = ceil_div(num, batch);

  Vec16 packet[batch][max_rows];
  int at;     // this thread's first packet of the batch, from the first column on
  int valid;  // packets of a row that are sent; beyond is its padding
  const u8* source;
  u32 tag;

  __device__ __forceinline__ Fetch(const Cta& cta, const u8* buffer, u32 tag_, int first_packet = 0) : tag(tag_) {
    at = cta.thread;
    valid = min(ceil_div(cols, 8) - first_packet, packets);
    source = buffer + first_packet * 16;
  }
  __device__ __forceinline__ int packet_idx(int j) const { return at + j * num_consumers; }
  __device__ __forceinline__ bool is_sent(const Cta& cta, int j, int row) const {
    return packet_idx(j) < valid && row < cta.args.num_rows;
  }
  __device__ __forceinline__ Vec16 load(int j, int row) const {
    return ld_relaxed_gpu_b128(source + row * x_row_bytes(cols) + packet_idx(j) * 16);
  }
  __device__ __forceinline__ void issue(const Cta& cta) {
#pragma unroll
    for (int j = 0; j < batch; ++j) {
#pragma unroll
      for (int row = 0; row < max_rows; ++row) {
        packet[j][row] = Vec16{};
        if (is_sent(cta, j, row)) packet[j][row] = load(j, row);
      }
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
#pragma unroll
        for (int row = 0; row < max_rows; ++row) {
          if (is_sent(cta, j, row) && !arrived<Payload::half>(packet[j][row], tag)) {
            packet[j][row] = load(j, row);
            complete = false;
          }
        }
      }
    } while (!complete && !patience.ends(cta.args, cta.shared, WaitKind::packet));
  }
  // x: `X`, as F multiplies it, from packet `first` on. The padding columns become zeros; rows that do not exist are left
  // alone.
  template <class F, class X>
  __device__ __forceinline__ void store(const Cta& cta, u8* x, int first = 0) const {
    Conversion<F> conversion[batch][max_rows];
    for_each_packet(cta, [&](int j, int row) { conversion[j][row].look_at(cta, packet[j][row]); });
    for_each_packet(cta, [&](int j, int row) {
      const int at_x = first + packet_idx(j);
      conversion[j][row].template store<X>(x + row * X::stride, at_x, packet[j][row], packet_idx(j) < packets);
    });
  }
  // Of those of the warp.
  template <class Body>
  __device__ __forceinline__ void for_each_packet(const Cta& cta, Body&& body) const {
#pragma unroll
    for (int j = 0; j < batch; ++j) {
      if (packet_idx(j) - cta.lane >= packets) continue;
#pragma unroll
      for (int row = 0; row < max_rows; ++row) {
        if (row < cta.args.num_rows) body(j, row);
      }
    }
  }
  __device__ __forceinline__ void next_batch() { at += batch * num_consumers; }

  // All of them; `issued`: they are on their way already. `meet` is called before the first is stored.
  template <class F, class X, class Meet>
  __device__ __forceinline__ void load(const Cta& cta, u8* x, int first, bool issued, Meet&& meet) {
#pragma unroll
    for (int i = 0; i < batches; ++i) {
      if (i > 0 || !issued) issue(cta);
      await(cta);
      if (i == 0) meet();
      store<F, X>(cta, x, first);
      next_batch();
    }
    cta.consumer_sync();
  }
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

// A warp's share of a row's sum of squares, for `NormFactors`.
__device__ __forceinline__ void leave_squares(const Cta& cta, int row, float sum) {
  cta.shared.squares[row][cta.warp] = sum;
}

// All of a stage's activations, or those that come early. They take the place of those of the stage before, which every
// warp must have left.
template <class S>
__device__ __forceinline__ void load_x(const Cta& cta, const u8* buffer, u32 tag) {
  Fetch<S::cols, S::early_packets> fetch(cta, buffer, tag);
  fetch.template load<typename S::F, typename S::X>(cta, cta.x, 0, false, [&] { cta.consumer_sync(); });
}

// Every row's sum over the warp's lanes: [max_rows] values of each lane -> the lane's row `row_of_lane` in value[0].
// Lanes halve the rows among them as they go; which values are added to which does not depend on max_rows.
struct RowSums {
  float value[max_rows];

  __device__ __forceinline__ void reduce(int lane) {
    int rows = max_rows;
#pragma unroll
    for (int d = 16; d > 0; d /= 2) {
      if (rows > 1) {
        rows /= 2;
        const bool upper = lane & d;
#pragma unroll
        for (int i = 0; i < max_rows / 2; ++i) {
          if (i >= rows) break;
          const float sent = upper ? value[i] : value[i + rows];
          const float kept = upper ? value[i + rows] : value[i];
          value[i] = kept + __shfl_xor_sync(~0u, sent, d);
        }
      } else {
        value[0] += __shfl_xor_sync(~0u, value[0], d);
      }
    }
  }
  static __device__ __forceinline__ int row_of_lane(int lane) { return lane / (32 / max_rows); }
};

// Activations that lie in shared memory as 16-bit floats -> as the stage multiplies them. All warps, a row each.
template <class S>
__device__ __forceinline__ void convert_x(const Cta& cta) {
  using X = typename S::X;
  if constexpr (S::F::bits == 16) return;
  for (int row = cta.warp; row < cta.args.num_rows; row += num_consumer_warps) {
    u8* x = cta.x + row * X::stride;
    for (int first = 0; first < X::packets; first += 32) {
      const int packet = first + cta.lane;
      Vec16 values{};
      if (packet < X::packets) values = *reinterpret_cast<const Vec16*>(x + packet * 16);
      Conversion<typename S::F> conversion;
      conversion.look_at(cta, values);
      conversion.template store<X>(x, packet, values, packet < X::packets);
    }
  }
}

// The same as `load_x` for the input of a matrix behind a norm, from the hidden state.
template <class S>
__device__ INLINED_WITH_ROOM void load_normed_x(const Cta cta, const u8* buffer, u32 tag, u64 norm_offset) {
  using Rows = Fetch<S::cols, S::X::packets>;
  const float* norm = vector_at(cta, norm_offset);
  RowSums squares{};
  Rows fetch(cta, buffer, tag);
#pragma unroll
  for (int i = 0; i < Rows::batches; ++i) {
    NormWeights weights[Rows::batch];
    const auto load_weights = [&] {
#pragma unroll
      for (int j = 0; j < Rows::batch; ++j) {
        weights[j].load(norm, fetch.packet_idx(j), fetch.packet_idx(j) < fetch.valid);
      }
    };
    fetch.issue(cta);
    if constexpr (config::arch >= 90) load_weights();  // elsewhere no registers are left
    fetch.await(cta);
    if constexpr (config::arch < 90) load_weights();
    if (i == 0) cta.consumer_sync();
#pragma unroll
    for (int j = 0; j < Rows::batch; ++j) {
#pragma unroll
      for (int row = 0; row < max_rows; ++row) normalise(fetch.packet[j][row], weights[j], squares.value[row]);
    }
    fetch.template store<typename S::F, typename S::X>(cta, cta.x);
    fetch.next_batch();
  }
  squares.reduce(cta.lane);
  if (cta.lane % (32 / max_rows) == 0) {
    leave_squares(cta, RowSums::row_of_lane(cta.lane), squares.value[0]);
  }
  cta.consumer_sync();
}
