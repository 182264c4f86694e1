// The token loop of decode.cu without a model: the logits of every step come from outside.
#include "ptx.cuh"  // before the generated header, whose words it defines
#include "sample.cuh"

namespace {

const StepArgs* args;
const float* logits;  // [num_steps][num_rows][vocab_size]
Shared shared_memory[config::num_ctas];
alignas(128) u8 dynamic_memory[config::num_ctas][1 << 16];

// Warp 0 stands for the finisher.
void head(Cta& cta, int step) {
  using Head = Stage<Kind::lm_head>;
  Best best;
  for (int tile = Head::begin(cta.idx); cta.warp == 0 && tile < Head::end(cta.idx); ++tile) {
    for (int i = 0; 2 * i < cta.args.num_rows; ++i) {
      const int token = cta.lane / 16 + 2 * i, id = tile * tile_rows + cta.lane % 16;
      const bool valid = token < cta.args.num_rows && id < config::vocab_size;
      const float logit = valid ? logits[(u64(step) * cta.args.num_rows + token) * config::vocab_size + id] : 0.f;
      best.take(cta, tile, token, i, logit);
    }
  }
  if (cta.warp == 0) best.choose(cta);
  cta.consumer_sync();
}

void consume() {
  Cta cta(*args, dynamic_memory[blockIdx.x], shared_memory[blockIdx.x]);
  start_barriers(cta);
  cta.consumer_sync();
  for (int step = 0; step < args->num_steps; ++step) {
    head(cta, step);
    cta.shared.stop = ld_relaxed_sys(args->stop);
    if (choose_tokens(cta, step)) return;
  }
}

}  // namespace

extern "C" void draw(const StepArgs* step_args, const float* all_logits) {
  args = step_args;
  logits = all_logits;
  std::memset(shared_memory, 0, sizeof shared_memory);
  std::memset(dynamic_memory, 0xff, sizeof dynamic_memory);
  simt::run(config::num_ctas, num_consumers, consume);
}
