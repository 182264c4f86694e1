// The kernels of prefill.cu as functions of a shared library: emulate_NAME(number of CTAs, arguments).
#include "prefill.cu"

template <class... Parameters, class... Arguments>
void launch(int num_ctas, void (*kernel)(Parameters...), Arguments... arguments) {
  for (int cta = 0; cta < num_ctas; ++cta) {
    cta_barrier = std::make_unique<std::barrier<>>(threads);
    for (auto& barrier : warp_barrier) barrier = std::make_unique<std::barrier<>>(warp_size);
    std::vector<std::jthread> running;
    for (int thread = 0; thread < threads; ++thread) {
      running.emplace_back([=] {
        threadIdx.x = thread;
        blockIdx.x = cta;
        kernel(static_cast<Parameters>(arguments)...);
        cta_barrier->arrive_and_drop();  // one that returned early holds nobody up
        warp_barrier[thread / warp_size]->arrive_and_drop();
      });
    }
  }
}

#define EMULATE(name)                                                    \
  extern "C" void emulate_##name(int num_ctas, void** a) {               \
    [&]<class... P>(void (*kernel)(P...)) {                              \
      int i = 0;                                                         \
      auto values = std::tuple{*reinterpret_cast<P*>(a[i++])...};        \
      std::apply([&](auto... v) { launch(num_ctas, kernel, v...); }, values); \
    }(name);                                                             \
  }
EMULATE(unpack_16)
EMULATE(add_norm)
EMULATE(split_heads)
EMULATE(activate)
EMULATE(blend)
EMULATE(load_pages)
EMULATE(store_pages)
