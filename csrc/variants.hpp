// Code that is compiled once for each instruction set: which there are, and which one is in use.
//
// The rest of csrc/ is compiled for any machine of the architecture. So nothing has to be built for the machine at hand, and nothing runs
// there that it does not know. A table of functions for each variant, instead of the compiler's own dispatch (target_clones): that needs
// ifunc, which macOS and musl do not have, and does not let a test choose.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__GNUC__) && (defined(__x86_64__) || defined(__i386__))
#define SLLM_X86_VARIANTS 1
#else
#define SLLM_X86_VARIANTS 0
#endif

#define SLLM_TARGET_AVX2 __attribute__((target("avx2")))
#define SLLM_TARGET_AVX512 __attribute__((target("avx2,avx512f,avx512bw,avx512dq,avx512vl")))

// The bodies below have to become part of the functions that have a target of their own, whatever the compiler thinks of their size.
#define SLLM_BODY [[gnu::always_inline]] inline

namespace sllm {

// exp(x) for x <= 0 to about 2e-7, written so that compilers turn a loop of it into vector code; std::exp is a call for each
// element.
SLLM_BODY float exp_negative(float x) {
    x = x > -87.0F ? x : -87.0F; // NaN becomes -87
    const float t = x * 1.44269504F;
    const float whole = static_cast<float>(static_cast<int32_t>(t - 0.5F)); // nearest integer: t <= 0
    const float f = (t - whole) * 0.693147181F;
    float p = 1.0F / 5040.0F;
    p = p * f + 1.0F / 720.0F;
    p = p * f + 1.0F / 120.0F;
    p = p * f + 1.0F / 24.0F;
    p = p * f + 1.0F / 6.0F;
    p = p * f + 0.5F;
    p = p * f + 1.0F;
    p = p * f + 1.0F;
    const int32_t exponent = (static_cast<int32_t>(whole) + 127) << 23;
    float scale = 0;
    std::memcpy(&scale, &exponent, sizeof scale);
    return p * scale;
}

constexpr int32_t most_variants = 3; // baseline, AVX2, AVX-512

// How many variants this machine can run, the best one last, and which is in use: the best, or what use_variant() has set.
int32_t n_variants();
int32_t variant();
void use_variant(int32_t index);

} // namespace sllm
