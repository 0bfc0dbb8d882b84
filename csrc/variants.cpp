// Which instruction sets this machine has, of those that some code is compiled for.

#include "variants.hpp"

#include <algorithm>
#include <atomic>

namespace {

int32_t count_variants() {
    int32_t n = 1;
#if SLLM_X86_VARIANTS
    // These also ask whether the system saves the wider registers.
    if (__builtin_cpu_supports("avx2")) {
        ++n;
        if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
            __builtin_cpu_supports("avx512vl")) {
            ++n;
        }
    }
#endif
    return n;
}

std::atomic<int32_t> & in_use() {
    static std::atomic<int32_t> index{sllm::n_variants() - 1};
    return index;
}

} // namespace

namespace sllm {

int32_t n_variants() {
    static const int32_t n = count_variants();
    return n;
}

int32_t variant() { return in_use().load(std::memory_order_relaxed); }

void use_variant(int32_t index) { in_use().store(std::clamp(index, 0, n_variants() - 1), std::memory_order_relaxed); }

} // namespace sllm
