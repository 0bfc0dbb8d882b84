// The loops over a whole vocabulary. The rest of csrc/ is compiled for any machine of the architecture; these are compiled once for each
// instruction set, and the best that the machine has is chosen when the first row is read. So nothing has to be built for the machine at
// hand, and nothing runs there that it does not know.
//
// A table of pointers instead of the compiler's own dispatch (target_clones): that needs ifunc, which macOS and musl do not have, and does
// not let a test choose.

#include "rows.hpp"

#include <algorithm>
#include <atomic>
#include <limits>

#if defined(__GNUC__) && (defined(__x86_64__) || defined(__i386__))
#define SLLM_X86_VARIANTS 1
#else
#define SLLM_X86_VARIANTS 0
#endif

// The bodies below have to become part of the functions that have a target of their own, whatever the compiler thinks of their size.
#define SLLM_BODY [[gnu::always_inline]] inline

namespace {

using sllm::group_lanes;
using sllm::search_step;
using sllm::stripe;

constexpr int32_t n_lanes = 16; // of sums: how many, decides what they come to

constexpr float minus_infinity = -std::numeric_limits<float>::infinity();

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

SLLM_BODY float larger(float a, float b) { return a > b ? a : b; } // b where a is NaN

SLLM_BODY float largest_body(const float * logits, int32_t n) {
    constexpr int32_t width = 4 * n_lanes; // several chains, or each comparison would wait for the one before
    float lanes[width];
    for (float & lane : lanes) {
        lane = minus_infinity;
    }
    int32_t i = 0;
    for (; i + width <= n; i += width) {
        for (int32_t j = 0; j < width; ++j) {
            lanes[j] = larger(logits[i + j], lanes[j]);
        }
    }
    float best = minus_infinity;
    for (const float lane : lanes) {
        best = larger(lane, best);
    }
    for (; i < n; ++i) {
        best = larger(logits[i], best);
    }
    return best;
}

SLLM_BODY int32_t search_body(const float * logits, int32_t begin, int32_t n, float value) {
    for (; begin + search_step <= n; begin += search_step) { // a search that may end at any element is no vector code
        int32_t hits[n_lanes] = {};
        for (int32_t i = 0; i < search_step; i += n_lanes) {
            for (int32_t j = 0; j < n_lanes; ++j) {
                hits[j] |= logits[begin + i + j] >= value ? -1 : 0;
            }
        }
        int32_t any = 0;
        for (const int32_t hit : hits) {
            any |= hit;
        }
        if (any != 0) {
            return begin;
        }
    }
    for (int32_t i = begin; i < n; ++i) {
        if (logits[i] >= value) {
            return i;
        }
    }
    return n;
}

SLLM_BODY int32_t search_hash_body(uint64_t key, int32_t begin, int32_t n, uint64_t bound) {
    constexpr int32_t n_hashes = 8; // at once
    for (; begin + search_step <= n; begin += search_step) {
        int64_t hits[n_hashes] = {}; // negative: a hash is above the bound; all have 52 bits
        for (int32_t i = 0; i < search_step; i += n_hashes) {
            const uint64_t first = sllm::to_hash(key, begin + i); // the others are steps of a constant away, without a multiplication
            for (uint64_t j = 0; j < n_hashes; ++j) {
                hits[j] |= static_cast<int64_t>(bound - 1 - (sllm::mix(first + j * sllm::golden) >> 12));
            }
        }
        int64_t any = 0;
        for (const int64_t hit : hits) {
            any |= hit;
        }
        if (any < 0) {
            return begin;
        }
    }
    for (int32_t i = begin; i < n; ++i) {
        if (sllm::hash_of(key, i) >= bound) {
            return i;
        }
    }
    return n;
}

SLLM_BODY int32_t search_murmur_body(uint32_t state, int32_t begin, int32_t n, uint32_t flip, uint32_t bound) {
    for (; begin + search_step <= n; begin += search_step) {
        int32_t hits[n_lanes] = {};
        for (int32_t i = 0; i < search_step; i += n_lanes) {
            for (int32_t j = 0; j < n_lanes; ++j) {
                hits[j] |= (sllm::murmur_of(state, begin + i + j) ^ flip) <= bound ? -1 : 0;
            }
        }
        int32_t any = 0;
        for (const int32_t hit : hits) {
            any |= hit;
        }
        if (any != 0) {
            return begin;
        }
    }
    for (int32_t i = begin; i < n; ++i) {
        if ((sllm::murmur_of(state, i) ^ flip) <= bound) {
            return i;
        }
    }
    return n;
}

SLLM_BODY void maxima_body(const float * logits, int32_t n_stripes, float * out) {
    for (int32_t s = 0; s < n_stripes; ++s, logits += stripe, out += group_lanes) {
        float lanes[group_lanes];
        for (float & lane : lanes) {
            lane = minus_infinity;
        }
        for (int32_t i = 0; i < stripe; i += group_lanes) {
            for (int32_t j = 0; j < group_lanes; ++j) {
                lanes[j] = larger(logits[i + j], lanes[j]);
            }
        }
        for (int32_t j = 0; j < group_lanes; ++j) {
            out[j] = lanes[j];
        }
    }
}

SLLM_BODY double sum_exp_body(const float * logits, int32_t n, float top) {
    double total = 0;
    for (int32_t begin = 0; begin < n; begin += 4096) { // single-precision sums stay short
        const int32_t end = begin + 4096 < n ? begin + 4096 : n;
        float lanes[n_lanes] = {};
        int32_t i = begin;
        for (; i + n_lanes <= end; i += n_lanes) {
            for (int32_t j = 0; j < n_lanes; ++j) {
                lanes[j] += exp_negative(logits[i + j] - top);
            }
        }
        for (; i < end; ++i) {
            lanes[0] += exp_negative(logits[i] - top);
        }
        for (const float lane : lanes) {
            total += static_cast<double>(lane);
        }
    }
    return total;
}

SLLM_BODY double sum_exp_scaled_body(const float * logits, int32_t n, float top, double temperature) {
    const auto term = [=](float logit) __attribute__((always_inline)) {
        const double scaled = (static_cast<double>(logit) - static_cast<double>(top)) / temperature;
        return static_cast<double>(exp_negative(static_cast<float>(scaled)));
    };
    double lanes[n_lanes] = {};
    int32_t i = 0;
    for (; i + n_lanes <= n; i += n_lanes) {
        for (int32_t j = 0; j < n_lanes; ++j) {
            lanes[j] += term(logits[i + j]);
        }
    }
    double total = 0;
    for (const double lane : lanes) {
        total += lane;
    }
    for (; i < n; ++i) {
        total += term(logits[i]);
    }
    return total;
}

#define SLLM_ROW_CODE(name, target)                                                                                                        \
    namespace name {                                                                                                                       \
    target float largest(const float * logits, int32_t n) { return largest_body(logits, n); }                                              \
    target int32_t search(const float * logits, int32_t begin, int32_t n, float value) { return search_body(logits, begin, n, value); }    \
    target int32_t search_hash(uint64_t key, int32_t begin, int32_t n, uint64_t bound) { return search_hash_body(key, begin, n, bound); }  \
    target int32_t search_murmur(uint32_t state, int32_t begin, int32_t n, uint32_t flip, uint32_t bound) {                                \
        return search_murmur_body(state, begin, n, flip, bound);                                                                           \
    }                                                                                                                                      \
    target void maxima(const float * logits, int32_t n_stripes, float * out) { maxima_body(logits, n_stripes, out); }                      \
    target double sum_exp(const float * logits, int32_t n, float top) { return sum_exp_body(logits, n, top); }                             \
    target double sum_exp_scaled(const float * logits, int32_t n, float top, double temperature) {                                         \
        return sum_exp_scaled_body(logits, n, top, temperature);                                                                           \
    }                                                                                                                                      \
    constexpr sllm::RowCode code = {#name, largest, search, search_hash, search_murmur, maxima, sum_exp, sum_exp_scaled};                  \
    }

SLLM_ROW_CODE(baseline, )
#if SLLM_X86_VARIANTS
SLLM_ROW_CODE(avx2, __attribute__((target("avx2"))))
SLLM_ROW_CODE(avx512, __attribute__((target("avx2,avx512f,avx512bw,avx512dq,avx512vl"))))
#endif

// What this machine can run, the best one last.
struct Variants {
    const sllm::RowCode * codes[3] = {&baseline::code};
    int32_t n = 1;

    Variants() {
#if SLLM_X86_VARIANTS
        // These also ask whether the system saves the wider registers.
        if (__builtin_cpu_supports("avx2")) {
            codes[n++] = &avx2::code;
            if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                __builtin_cpu_supports("avx512vl")) {
                codes[n++] = &avx512::code;
            }
        }
#endif
    }
};

const Variants & variants() {
    static const Variants all;
    return all;
}

std::atomic<const sllm::RowCode *> & in_use() {
    static std::atomic<const sllm::RowCode *> code{variants().codes[variants().n - 1]};
    return code;
}

} // namespace

namespace sllm {

const RowCode & row_code() { return *in_use().load(std::memory_order_relaxed); }

int32_t n_row_codes() { return variants().n; }

void use_row_code(int32_t index) { in_use().store(variants().codes[std::clamp(index, 0, variants().n - 1)], std::memory_order_relaxed); }

} // namespace sllm
