// The loops over a whole vocabulary, compiled once for each instruction set (variants.hpp); the best that the machine has is chosen when the
// first row is read.

#include "rows.hpp"

#include "variants.hpp"

#include <limits>

namespace {

using sllm::exp_negative;
using sllm::group_lanes;
using sllm::search_step;
using sllm::stripe;

constexpr int32_t n_lanes = 16; // of sums: how many, decides what they come to

constexpr float minus_infinity = -std::numeric_limits<float>::infinity();

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

// The first search_step elements from `begin` on among which `hit` is true of one, or the first one of the rest; n for none.
template <typename Hit> SLLM_BODY int32_t search_lanes(int32_t begin, int32_t n, Hit hit) {
    for (; begin + search_step <= n; begin += search_step) { // a search that may end at any element is no vector code
        int32_t hits[n_lanes] = {};
        for (int32_t i = 0; i < search_step; i += n_lanes) {
            for (int32_t j = 0; j < n_lanes; ++j) {
                hits[j] |= hit(begin + i + j) ? -1 : 0;
            }
        }
        int32_t any = 0;
        for (const int32_t one : hits) {
            any |= one;
        }
        if (any != 0) {
            return begin;
        }
    }
    for (int32_t i = begin; i < n; ++i) {
        if (hit(i)) {
            return i;
        }
    }
    return n;
}

SLLM_BODY int32_t search_body(const float * logits, int32_t begin, int32_t n, float value) {
    return search_lanes(begin, n, [=](int32_t i) { return logits[i] >= value; });
}

SLLM_BODY int32_t search_murmur_body(uint32_t state, int32_t begin, int32_t n, uint32_t flip, uint32_t bound) {
    return search_lanes(begin, n, [=](int32_t i) { return (sllm::murmur_of(state, i) ^ flip) <= bound; });
}

// Not by search_lanes: the lanes are of 64 bits, and a hash is cheap only as a step from the one before.
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
SLLM_ROW_CODE(avx2, SLLM_TARGET_AVX2)
SLLM_ROW_CODE(avx512, SLLM_TARGET_AVX512)
#endif

constexpr const sllm::RowCode * codes[sllm::most_variants] = {
    &baseline::code,
#if SLLM_X86_VARIANTS
    &avx2::code,
    &avx512::code,
#endif
};

} // namespace

namespace sllm {

const RowCode & row_code() { return *codes[variant()]; }

} // namespace sllm
