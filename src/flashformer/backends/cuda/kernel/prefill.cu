// A prompt's work besides matrix products and attention; prefill_ops.py says what each kernel computes.
//
// All of it is bound by memory: a value is read once and written once, between the matrix products of torch.
#include "past.cuh"

constexpr int prefill_threads = 256;
constexpr int prefill_warps = prefill_threads / 32;

__device__ __forceinline__ u16 round_16(float v, bool to_f16) {
  return static_cast<u16>(to_f16 ? cvt_f16x2(v, 0.f) : cvt_bf16x2(v, 0.f));
}

__device__ __forceinline__ float widen_16(u32 bits, bool from_f16) {
  return from_f16 ? cvt_f32_f16(static_cast<u16>(bits)) : __uint_as_float(bits << 16);
}

// Over all threads, in a fixed order.
__device__ __forceinline__ float cta_sum(float v) {
  __shared__ float sums[prefill_warps];
  v = warp_sum(v);
  if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = v;
  __syncthreads();
  v = 0;
#pragma unroll
  for (int w = 0; w < prefill_warps; ++w) v += sums[w];
  return v;
}

// tiles [num_tiles][blocks][512] in fragment order -> rows [16 num_tiles][16 blocks]. A warp moves 8 blocks of a tile.
extern "C" __global__ void __launch_bounds__(prefill_threads)
    unpack_16(const u8* tiles, u8* rows, int num_tiles, int blocks) {
  constexpr int span_blocks = 8;
  const int lane = threadIdx.x % 32;
  const int spans = (blocks + span_blocks - 1) / span_blocks;
  const u32 span = blockIdx.x * prefill_warps + threadIdx.x / 32;
  const int tile = span / spans;
  const int first = span % spans * span_blocks;
  if (tile >= num_tiles) return;
  const u8* source = tiles + (u64(tile) * blocks + first) * 512 + lane * 16;
  u8* target = rows + ((u64(tile) * tile_rows + lane / 4) * blocks + first) * 32 + lane % 4 * 8;
  const u64 half = 8ull * blocks * 32;  // to the row 8 further down
  Vec16 v[span_blocks];
#pragma unroll
  for (int i = 0; i < span_blocks; ++i) {
    if (first + i < blocks) v[i] = *reinterpret_cast<const Vec16*>(source + i * 512);
  }
#pragma unroll
  for (int i = 0; i < span_blocks; ++i) {
    if (first + i >= blocks) continue;
    *reinterpret_cast<uint2*>(target + i * 32) = make_uint2(v[i].w[0], v[i].w[2]);
    *reinterpret_cast<uint2*>(target + half + i * 32) = make_uint2(v[i].w[1], v[i].w[3]);
  }
}

// One CTA a row: hidden += update + bias (each may be null), then RMSNorm of it to 16 bits.
extern "C" __global__ void __launch_bounds__(prefill_threads)
    add_norm(float* hidden, const float* update, const float* bias, const float* weight, u16* out, int to_f16) {
  constexpr int width = config::hidden_size % 4 == 0 ? 4 : 1;
  constexpr int steps = (config::hidden_size + prefill_threads * width - 1) / (prefill_threads * width);
  struct alignas(4 * width) Part { float v[width]; };
  struct alignas(2 * width) Rounded { u16 v[width]; };
  const u64 row = u64(blockIdx.x) * config::hidden_size;
  Part x[steps];
  float square = 0;
#pragma unroll
  for (int j = 0; j < steps; ++j) {
    const int at = (threadIdx.x + j * prefill_threads) * width;
    if (at >= config::hidden_size) continue;
    x[j] = *reinterpret_cast<const Part*>(hidden + row + at);
    if (update) {
      const Part u = *reinterpret_cast<const Part*>(update + row + at);
#pragma unroll
      for (int i = 0; i < width; ++i) x[j].v[i] += bias ? u.v[i] + bias[at + i] : u.v[i];
      *reinterpret_cast<Part*>(hidden + row + at) = x[j];
    }
#pragma unroll
    for (int i = 0; i < width; ++i) square += x[j].v[i] * x[j].v[i];
  }
  const float rstd = rsqrtf(cta_sum(square) / config::hidden_size + config::rms_norm_eps);
#pragma unroll
  for (int j = 0; j < steps; ++j) {
    const int at = (threadIdx.x + j * prefill_threads) * width;
    if (at >= config::hidden_size) continue;
    const Part w = *reinterpret_cast<const Part*>(weight + at);
    Rounded r;
#pragma unroll
    for (int i = 0; i < width; ++i) r.v[i] = round_16(x[j].v[i] * rstd * w.v[i], to_f16);
    *reinterpret_cast<Rounded*>(out + row + at) = r;
  }
}

// One warp a head of a row: bias, QK-norm and rotary embedding of queries and keys, all rounded to bf16.
// qkv [rows][qkv_rows]; cosine, sine [rows][rotary_dim / 2] or null; query, keys, values [rows][heads][head_dim padded].
extern "C" __global__ void __launch_bounds__(prefill_threads)
    split_heads(const float* qkv, const float* bias, const float* q_norm, const float* k_norm, const float* cosine,
                const float* sine, u16* query, u16* keys, u16* values, int rows) {
  constexpr int q_heads = config::group * config::num_kv_heads;
  constexpr int heads = q_heads + 2 * config::num_kv_heads;
  constexpr int half = config::rotary_dim / 2;
  __shared__ float scratch[prefill_warps][config::head_dim];
  const int lane = threadIdx.x % 32;
  const u32 id = blockIdx.x * prefill_warps + threadIdx.x / 32;
  const int row = id / heads;
  const int head = id % heads;
  if (row >= rows) return;
  const bool is_query = head < q_heads;
  const bool is_value = head >= q_heads + config::num_kv_heads;
  float* x = scratch[threadIdx.x / 32];
  float square = 0;
#pragma unroll
  for (int dim = lane; dim < config::head_dim; dim += 32) {
    float value = qkv[u64(row) * config::qkv_rows + head * config::head_dim + dim];
    if (bias) value += bias[head * config::head_dim + dim];
    x[dim] = value;
    square += value * value;
  }
  if (config::qk_norm && !is_value) {
    const float* weight = is_query ? q_norm : k_norm;
    const float rstd = rsqrtf(warp_sum(square) / config::head_dim + config::rms_norm_eps);
    for (int dim = lane; dim < config::head_dim; dim += 32) x[dim] *= rstd * weight[dim];
  }
  __syncwarp();
  u16* to = is_query   ? query + (u64(row) * q_heads + head) * head_dim_padded
            : is_value ? values + (u64(row) * config::num_kv_heads + head - q_heads - config::num_kv_heads) * head_dim_padded
                       : keys + (u64(row) * config::num_kv_heads + head - q_heads) * head_dim_padded;
#pragma unroll
  for (int dim = lane; dim < head_dim_padded; dim += 32) {
    float value = dim < config::head_dim ? x[dim] : 0.f;
    if (half > 0 && cosine && !is_value && dim < 2 * half) {
      const u64 turn = u64(row) * half + (dim < half ? dim : dim - half);
      value = value * cosine[turn] + (dim < half ? -x[dim + half] : x[dim - half]) * sine[turn];
    }
    to[dim] = round_16(value, false);
  }
}

// silu(gate) * up, one thread a tile of a row: pairs [count][8 of gate, 8 of up] -> out [count][8]; count = rows x tiles.
// stored [tiles]: the place in `out` of each tile of a row of `pairs`.
extern "C" __global__ void __launch_bounds__(prefill_threads)
    activate(const Vec16* pairs, const float* bias, const int* stored, Vec16* out, u32 count, int tiles, int is_f16) {
  const u32 at = blockIdx.x * prefill_threads + threadIdx.x;
  if (at >= count) return;
  const Vec16 gates = pairs[2ull * at];
  const Vec16 ups = pairs[2ull * at + 1];
  const u32 tile = at % tiles;
  const float* b = bias ? bias + tile * tile_rows : nullptr;
  Vec16 result;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    u32 word = 0;
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      float gate = widen_16(gates.w[i] >> 16 * k & 0xffff, is_f16);
      float up = widen_16(ups.w[i] >> 16 * k & 0xffff, is_f16);
      if (b) {
        gate += b[2 * i + k];
        up += b[8 + 2 * i + k];
      }
      word |= static_cast<u32>(round_16(gate / (1.f + __expf(-gate)) * up, is_f16)) << 16 * k;
    }
    result.w[i] = word;
  }
  out[at - tile + stored[tile]] = result;
}

// out += share * (other - out), one thread eight channels: out, other [rows][q heads][head_dim padded], share [q heads][rows].
extern "C" __global__ void __launch_bounds__(prefill_threads)
    blend(Vec16* out, const Vec16* other, const float* share, u32 count, int rows) {
  constexpr u32 vecs = head_dim_padded / 8;
  constexpr u32 heads = config::group * config::num_kv_heads;
  const u32 at = blockIdx.x * prefill_threads + threadIdx.x;
  if (at >= count) return;
  const float part = share[u64(at / vecs % heads) * rows + at / (vecs * heads)];
  Vec16 own = out[at];
  const Vec16 added = other[at];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    u32 word = 0;
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      const float a = widen_16(own.w[i] >> 16 * k & 0xffff, false);
      const float b = widen_16(added.w[i] >> 16 * k & 0xffff, false);
      word |= static_cast<u32>(round_16(a + part * (b - a), false)) << 16 * k;
    }
    own.w[i] = word;
  }
  out[at] = own;
}

// Between pages of a layer and plain rows [num_pages x page_tokens][kv heads][head_dim padded], in one pass.
struct PageCopy {
  u8* layer;             // [pages][kv heads][keys, values][page]
  const long long* ids;  // [num_pages]
  uint2* keys;           // four channels each
  uint2* values;

  // One thread: two neighbouring positions of four neighbouring channels. Rows from num_tokens on are stored as zeros.
  template <bool store>
  __device__ __forceinline__ void run(int num_pages, int num_tokens) const {
    constexpr u32 quads = head_dim_padded / 4;
    const u32 at = blockIdx.x * prefill_threads + threadIdx.x;
    const int dim = at % quads * 4;
    const int head = at / quads % config::num_kv_heads;
    const int position = at / (quads * config::num_kv_heads) * 2;
    const int page = position / config::page_tokens;
    if (page >= num_pages) return;
    const int token = position % config::page_tokens;
    u8* stored_keys = layer + (u64(ids[page]) * config::num_kv_heads + head) * (2 * page_bytes);
    u8* stored_values = stored_keys + page_bytes;
    const u64 plain = (u64(position) * config::num_kv_heads + head) * quads + dim / 4;
    uint2 value[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      uint2* plain_key = keys + plain + i * config::num_kv_heads * quads;
      uint2* plain_value = values + plain + i * config::num_kv_heads * quads;
      uint2* stored_key = reinterpret_cast<uint2*>(stored_keys + key_offset(token + i, dim));
      if constexpr (store) {
        const bool exists = position + i < num_tokens;
        *stored_key = exists ? *plain_key : make_uint2(0, 0);
        value[i] = exists ? *plain_value : make_uint2(0, 0);
      } else {
        *plain_key = *stored_key;
      }
    }
#pragma unroll
    for (int c = 0; c < 4; ++c) {  // a stored word is one channel of both positions
      u32* word = reinterpret_cast<u32*>(stored_values + value_offset(token, dim + c));
      u32& low = c / 2 ? value[0].y : value[0].x;
      u32& high = c / 2 ? value[1].y : value[1].x;
      if constexpr (store) {
        *word = low >> c % 2 * 16 & 0xffff | high >> c % 2 * 16 << 16;
      } else {
        const u32 both = *word;
        low = c % 2 ? low | both << 16 : both & 0xffff;
        high = c % 2 ? high | both >> 16 << 16 : both >> 16;
      }
    }
    if constexpr (!store) {
#pragma unroll
      for (int i = 0; i < 2; ++i) values[plain + i * config::num_kv_heads * quads] = value[i];
    }
  }
};

extern "C" __global__ void __launch_bounds__(prefill_threads) 
    load_pages(u8* layer, const long long* ids, uint2* keys, uint2* values, int num_pages) {
  PageCopy{layer, ids, keys, values}.run<false>(num_pages, 0);
}
extern "C" __global__ void __launch_bounds__(prefill_threads)
    store_pages(u8* layer, const long long* ids, uint2* keys, uint2* values, int num_pages, int num_tokens) {
  PageCopy{layer, ids, keys, values}.run<true>(num_pages, num_tokens);
}
