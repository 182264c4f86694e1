// The last part of attention: every CTA sends the partial results of its units, then merges its heads.
#include "ptx.cuh"  // before the generated header, whose words it defines
#include "chunks.cuh"
#include "grid_barrier.cuh"

namespace {

const StepArgs* args;
const float* partials;  // [num_rows][num_q_heads][max_chunks][maximum, sum, head_dim_padded values]
Shared shared_memory[config::num_ctas];
alignas(128) u8 dynamic_memory[config::num_ctas][1 << 16];

void work() {
  Cta cta(*args, dynamic_memory[blockIdx.x], shared_memory[blockIdx.x]);
  const Exchange exchange(*args);
  constexpr int width = 2 + head_dim_padded;
  for (int layer = 0; layer < config::num_layers; ++layer) {
    for_each_unit(cta, 0, layer_table[layer].window, [&](int row, const RowPast& past, int kv_head, int chunk) {
      constexpr int pairs = config::head_dim / 2;
      for (int i = cta.thread; past.num_chunks > 1 && i < config::group * pairs; i += num_consumers) {
        const int head = kv_head * config::group + i / pairs, dim = i % pairs * 2;
        const float* partial = partials + ((row * num_q_heads + head) * config::max_chunks + chunk) * width;
        send_partial(partial_at(exchange, row, head, chunk), dim, {partial[2 + dim] + layer, partial[3 + dim] + layer},
                     partial[0], partial[1], epoch_of(cta, 0, layer));
      }
    });
    merge_chunks(cta, 0, layer, layer & 1);
    grid_barrier(cta);  // stands for the hand-offs until the next attention
  }
}

}  // namespace

extern "C" void merge(const StepArgs* step_args, const float* all_partials) {
  args = step_args;
  partials = all_partials;
  std::memset(shared_memory, 0, sizeof shared_memory);
  std::memset(dynamic_memory, 0xff, sizeof dynamic_memory);
  simt::run(config::num_ctas, num_consumers, work);
}
