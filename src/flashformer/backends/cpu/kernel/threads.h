// The team: one persistent thread for each CTA of the plan, the caller being CTA 0.
//
// A step is a sequence of phases that end in `Cta::sync`. Within a phase the CTAs take items from
// their own share of a split and, when it is empty, from the others', so that a CTA that the
// operating system holds up costs no more than the item in its hands. Results never depend on who
// did an item.
#pragma once

#include <algorithm>
#include <atomic>
#include <chrono>
#include <thread>
#include <vector>

#ifdef __linux__
#include <sched.h>
#endif

#include "simd.h"

struct alignas(64) Cursor {
  std::atomic<int> taken{0};  // items of the CTA's share that somebody has begun
};

// Where a CTA is, for those who wait for it.
struct alignas(64) Place {
  static constexpr int waiting = -1;
  std::atomic<int> phase{-1};  // in which it last began to work; -1: it sleeps between steps
  std::atomic<int> processor{waiting};  // on which it works
};

inline int current_processor() {
#ifdef __linux__
  return sched_getcpu();
#else
  return 0;
#endif
}

inline void yield_processor() { std::this_thread::yield(); }

// Memory that a waiting CTA pulls into its cache: the first weights of its next phase.
struct Ahead {
  const u8* next = nullptr;
  const u8* end = nullptr;

  void pull(int lines) {
    for (; lines > 0 && next < end; --lines, next += 64) __builtin_prefetch(next, 0, 2);
  }
};

// How long a CTA spins before it sleeps. Waking a thread takes some 60 microseconds in a virtual
// machine: after a shorter spin one CTA would fall asleep while the next wakes, again and again.
inline constexpr std::chrono::microseconds barrier_spin{400};
inline constexpr std::chrono::microseconds idle_spin{1000};  // between steps: the host picks a token

// Spins until ready() or the limit has passed; whether it became ready. Every microsecond or so
// relax() may give the processor to another thread.
template <class Ready, class Relax>
inline bool spin_until(Ready ready, Relax relax, std::chrono::microseconds limit, Ahead& ahead) {
  const auto start = std::chrono::steady_clock::now();
  do {
    for (int i = 0; i < 64; ++i) {
      if (ready()) return true;
      ahead.pull(2);
      simd::pause();
    }
    relax();
  } while (std::chrono::steady_clock::now() - start < limit);
  return ready();
}

class Team;

// A CTA's view of the team.
struct Cta {
  Team& team;
  const int idx;
  unsigned phase = 0;  // counts the barriers that this CTA has passed

  // Waits until every CTA is here: release what this one wrote, acquire what the others wrote.
  void sync(Ahead ahead = {});
  // Calls work(first, end) for pieces of up to `piece` items; CTA c owns first_item(c) ..
  // first_item(c + 1).
  template <class FirstItem, class Work>
  void share(FirstItem first_item, int piece, Work&& work);
  // The same for `total` items in equal parts.
  template <class Work>
  void share_evenly(int total, int piece, Work&& work);
};

class Team {
 public:
  using Body = void (*)(Cta&, void*);

  explicit Team(int size) : size_(size), cursors_(2 * std::size_t(size)), places_(std::size_t(size)) {
    for (int idx = 1; idx < size; ++idx) threads_.emplace_back([this, idx] { serve(idx); });
  }

  ~Team() {
    body_ = nullptr;
    announce();
    for (auto& thread : threads_) thread.join();
  }

  int size() const { return size_; }

  // Runs body(cta, argument) on every CTA; returns when all have passed their last sync.
  void run(Body body, void* argument) {
    body_ = body;
    argument_ = argument;
    announce();
    begin_phase(0);
    body(caller_, argument);
  }

  Cursor& cursor(unsigned phase, int idx) { return cursors_[(phase & 1) * std::size_t(size_) + std::size_t(idx)]; }

  void arrive_and_wait(int idx, Ahead& ahead) {
    places_[std::size_t(idx)].processor.store(Place::waiting, std::memory_order_relaxed);
    wait_for_all(ahead);
    begin_phase(idx);
  }

 private:
  void begin_phase(int idx) {
    Place& place = places_[std::size_t(idx)];
    place.processor.store(current_processor(), std::memory_order_relaxed);
    place.phase.store(phase_.load(std::memory_order_relaxed), std::memory_order_relaxed);
  }

  void wait_for_all(Ahead& ahead) {
    const int phase = phase_.load(std::memory_order_relaxed);
    // acq_rel: the last to arrive has seen the writes of all; the store below passes them on.
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == size_) {
      arrived_.store(0, std::memory_order_relaxed);
      phase_.store(phase + 1, std::memory_order_release);
      wake(phase_);
      return;
    }
    const auto passed = [&] { return phase_.load(std::memory_order_acquire) != phase; };
    const auto make_way = [&] {
      if (may_be_in_the_way_of_another(phase)) yield_processor();
    };
    if (!spin_until(passed, make_way, barrier_spin, ahead)) phase_.wait(phase, std::memory_order_acquire);
  }

  // Whether a CTA that the phase needs may be queued behind this thread: it works on the processor on
  // which this thread spins, or was woken and has not begun.
  bool may_be_in_the_way_of_another(int phase) const {
    const int here = current_processor();
    return std::any_of(places_.begin(), places_.end(), [&](const Place& place) {
      return place.phase.load(std::memory_order_relaxed) != phase ||
             place.processor.load(std::memory_order_relaxed) == here;
    });
  }

  void announce() {
    epoch_.fetch_add(1, std::memory_order_release);
    wake(epoch_);
  }

  // The fence keeps the new value before the look for sleepers: without it a thread that is just
  // falling asleep can miss both.
  static void wake(std::atomic<int>& changed) {
    std::atomic_thread_fence(std::memory_order_seq_cst);
    changed.notify_all();
  }

  void serve(int idx) {
    Cta cta{*this, idx};
    Ahead nothing;
    for (int seen = 0;; ++seen) {
      const auto called = [&] { return epoch_.load(std::memory_order_acquire) != seen; };
      if (!spin_until(called, [] {}, idle_spin, nothing)) epoch_.wait(seen, std::memory_order_acquire);
      if (body_ == nullptr) return;
      begin_phase(idx);
      body_(cta, argument_);
      places_[std::size_t(idx)].phase.store(-1, std::memory_order_relaxed);
    }
  }

  const int size_;
  std::vector<Cursor> cursors_;  // [2 phases][size]
  std::vector<Place> places_;  // [size]
  Cta caller_{*this, 0};
  Body body_ = nullptr;
  void* argument_ = nullptr;
  alignas(64) std::atomic<int> epoch_{0};  // steps announced
  alignas(64) std::atomic<int> arrived_{0};
  alignas(64) std::atomic<int> phase_{0};
  std::vector<std::thread> threads_;
};

inline void Cta::sync(Ahead ahead) {
  // The other set of cursors was last used a phase ago; nobody touches it before the barrier.
  team.cursor(phase + 1, idx).taken.store(0, std::memory_order_relaxed);
  team.arrive_and_wait(idx, ahead);
  ++phase;
}

template <class FirstItem, class Work>
void Cta::share(FirstItem first_item, int piece, Work&& work) {
  for (int i = 0; i < team.size(); ++i) {
    const int owner = (idx + i) % team.size();
    std::atomic<int>& taken = team.cursor(phase, owner).taken;
    const int start = first_item(owner), end = first_item(owner + 1);
    while (taken.load(std::memory_order_relaxed) < end - start) {
      const int first = start + taken.fetch_add(piece, std::memory_order_relaxed);
      if (first < end) work(first, std::min(first + piece, end));
    }
  }
}

template <class Work>
void Cta::share_evenly(int total, int piece, Work&& work) {
  share([&](int cta) { return int(i64(total) * cta / team.size()); }, piece, work);
}
