// The whole decoder: every thread of every CTA of decode.cu.
#include "ptx.cuh"  // before the generated header, whose words it defines
#include "decode.cu"

namespace {

const StepArgs* args;
Shared shared_memory[config::num_ctas];
alignas(128) u8 dynamic_memory[config::num_ctas][227 << 10];

void work() {
  Cta cta(*args, dynamic_memory[blockIdx.x], shared_memory[blockIdx.x]);
  run_role<Consumer, Finisher>(cta);
}

}  // namespace

// The host sets the stop word when the clock says `stop_at`, unless that is 0. Returns what it says at the end.
extern "C" u64 emulate(const StepArgs* step_args, u32 seed, u64 stop_at, u32 lost_bits) {
  args = step_args;
  if (args->x_bytes + args->num_slots * config::slot_bytes > sizeof *dynamic_memory) std::abort();
  simt::lost_bits = lost_bits;
  std::memset(shared_memory, 0xff, sizeof shared_memory);
  std::memset(dynamic_memory, 0xff, sizeof dynamic_memory);
  static const char word[] = {1, 0, 0, 0};
  if (stop_at > 0) simt::copy_later({stop_at, reinterpret_cast<char*>(const_cast<u32*>(args->stop)), word, 4, nullptr});
  simt::run(config::num_ctas, num_consumers + 64, work, seed);
  return simt::clock;
}
