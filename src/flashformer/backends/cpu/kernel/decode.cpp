// One step through the whole model, and the functions that Python calls.
#include <sys/mman.h>

#include <chrono>
#include <new>
#include <system_error>

#include "attend.h"
#include "bandwidth.h"
#include "embed.h"
#include "projections.h"
#include "qkv.h"

// A CTA's moments of a step: its start, and when it had done its part of each stage.
constexpr int num_stages = 3 + 5 * config::num_layers;
constexpr int num_moments = 1 + num_stages;

// The steady clock in ns.
static long long now() {
  return std::chrono::nanoseconds(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// Every CTA runs this. A step that stops early (args.stop_after counts the plan's stages) leaves the
// buffers as that stage wrote them.
static void decode(Cta& cta, Step& step) {
  // Once the last sync has passed, the caller may have left and taken the arguments along.
  const int stop_after = step.args.stop_after;
  int stage = 0;
  // Before the barrier: behind it a CTA may sleep on while the others are at the next stage.
  const auto note_time = [&](int moment) { step.args.stage_times[cta.idx * num_moments + moment] = now(); };
  const auto ends = [&](Ahead next) {
    note_time(stage + 1);
    cta.sync(next);
    return stage++ == stop_after;
  };
  if (cta.idx == 0) note_time(0);
  embed(cta, step);
  if (ends({})) return;
  for (int i = 0; i < config::num_layers; ++i) {
    const Layer& layer = config::layers[i];
    qkv(cta, step, layer);
    if (ends({})) return;
    attention(cta, step, layer);
    if (ends(ahead_of(step, layer.o_proj, cta))) return;
    o_proj(cta, step, layer);
    if (ends(ahead_of(step, layer.gate_up, cta))) return;
    gate_up(cta, step, layer);
    if (ends(ahead_of(step, layer.down, cta))) return;
    down(cta, step, layer);
    if (ends(ahead_of(step, i + 1 < config::num_layers ? config::layers[i + 1].qkv : config::lm_head, cta))) return;
  }
  lm_head(cta, step);
  ends({});
  if (cta.idx == 0) {
    sample(step);
    note_time(num_stages);
  }
}

// A team of threads with its buffers.
struct Decoder {
  Team team{config::num_ctas};
  Workspace space;
  u8* memory;
  i64 bytes;
};

static u8* map_memory(i64 bytes) {
  void* memory = mmap(nullptr, std::size_t(bytes), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  return memory == MAP_FAILED ? nullptr : static_cast<u8*>(memory);
}

#pragma GCC visibility push(default)
extern "C" {

// Null if there is no memory or no threads to be had.
Decoder* decoder_open() {
  Arena counter(nullptr);
  take_workspace(counter, most_head_tiles());
  u8* memory = map_memory(counter.used());
  if (memory == nullptr) return nullptr;
  try {
    auto* decoder = new Decoder;
    Arena arena(memory);
    decoder->space = take_workspace(arena, most_head_tiles());
    decoder->memory = memory;
    decoder->bytes = counter.used();
    return decoder;
  } catch (const std::system_error&) {
    munmap(memory, std::size_t(counter.used()));
    return nullptr;
  }
}

void decoder_close(Decoder* decoder) {
  u8* memory = decoder->memory;
  const i64 bytes = decoder->bytes;
  delete decoder;
  munmap(memory, std::size_t(bytes));
}

void decoder_step(Decoder* decoder, const StepArgs* args) {
  Step step{*args, decoder->space};
  decoder->team.run([](Cta& cta, void* argument) { decode(cta, *static_cast<Step*>(argument)); }, &step);
}

// For tests: a buffer [max_rows][*stride] of floats by its name in the plan's stages, or null.
const float* decoder_buffer(const Decoder* decoder, int which, i64* stride) {
  const Workspace& space = decoder->space;
  const float* const buffers[] = {space.hidden, space.q, space.attended, space.activated};
  const i64 strides[] = {hidden_stride, q_stride, q_stride, activated_stride};
  if (which < 0 || which >= 4) return nullptr;
  *stride = strides[which];
  return buffers[which];
}

// GB/s of plain reads of `data`; see bandwidth.h.
double decoder_read_bandwidth(Decoder* decoder, const u8* data, i64 bytes, double seconds) {
  BandwidthTest test{data, bytes, seconds};
  decoder->team.run([](Cta& cta, void* argument) { static_cast<BandwidthTest*>(argument)->run(cta); }, &test);
  return test.gb_per_s;
}

}  // extern "C"
#pragma GCC visibility pop
