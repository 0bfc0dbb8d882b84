// What selection does with a whole row of logits: the loops over the vocabulary, compiled for several instruction sets.
#pragma once

#include <cstdint>
#include <cstring>

namespace sllm {

// Every variant gives the same results to the last bit: comparisons and integers do not depend on how wide the vectors are, and sums are
// taken in lanes of a fixed number.
struct RowCode {
    const char * name;

    // The largest logit. NaN never wins; -inf if there is nothing else.
    float (*largest)(const float * logits, int32_t n);

    // Where a search from `begin` should look next: a position not behind the first logit >= `value`, and fewer than `search_step` before it;
    // `n` if there is none.
    int32_t (*search)(const float * logits, int32_t begin, int32_t n, float value);

    // The same for the first token whose hash_of(key, token) is >= `bound`.
    int32_t (*search_hash)(uint64_t key, int32_t begin, int32_t n, uint64_t bound);

    // The same for the first index whose murmur_of(state, index) ^ `flip` is <= `bound`: the small hashes, or with every bit flipped the
    // large ones.
    int32_t (*search_murmur)(uint32_t state, int32_t begin, int32_t n, uint32_t flip, uint32_t bound);

    // The largest of each `group_depth` logits, NaN left out, -inf if there is nothing else. They are taken `group_lanes` apart, so that no
    // two neighbours in a vector have to be compared: out[s * group_lanes + j] is the largest of logits[s * stripe + j],
    // logits[s * stripe + group_lanes + j], ... for each of `n_stripes` stripes.
    void (*maxima)(const float * logits, int32_t n_stripes, float * out);

    // Sum of exp(logit - top): every term is at most 1, and the whole is good to about 1e-6.
    double (*sum_exp)(const float * logits, int32_t n, float top);

    // Sum of exp((logit - top) / temperature).
    double (*sum_exp_scaled)(const float * logits, int32_t n, float top, double temperature);
};

constexpr int32_t search_step = 64;
constexpr int32_t group_lanes = 32;
constexpr int32_t group_depth = 32;
constexpr int32_t stripe = group_lanes * group_depth;

// The finaliser of splitmix64: every input bit reaches every output bit.
constexpr uint64_t mix(uint64_t x) {
    x ^= x >> 30;
    x *= 0xbf58476d1ce4e5b9ULL;
    x ^= x >> 27;
    x *= 0x94d049bb133111ebULL;
    x ^= x >> 31;
    return x;
}

constexpr uint64_t golden = 0x9e3779b97f4a7c15ULL; // 2^64 / golden ratio, odd: the steps of a Weyl sequence

// 52 random bits for each (key, token).
constexpr uint64_t to_hash(uint64_t key, int32_t token) { return key + golden * (static_cast<uint32_t>(token) + 1ULL); }
constexpr uint64_t hash_of(uint64_t key, int32_t token) { return mix(to_hash(key, token)) >> 12; }

// MurmurHash3 (x86, 32 bits; A. Appleby, public domain) of 16 bytes in four blocks: `state` is what the first three leave, and the index is
// the last one.
constexpr uint32_t rotate_left(uint32_t x, int n) { return (x << n) | (x >> (32 - n)); }
constexpr uint32_t murmur_block(uint32_t state, uint32_t block) {
    const uint32_t mixed = rotate_left(block * 0xcc9e2d51U, 15) * 0x1b873593U;
    return rotate_left(state ^ mixed, 13) * 5 + 0xe6546b64U;
}
constexpr uint32_t murmur_of(uint32_t state, int32_t index) {
    uint32_t h = murmur_block(state, static_cast<uint32_t>(index)) ^ 16U; // the number of bytes
    h = (h ^ (h >> 16)) * 0x85ebca6bU;
    h = (h ^ (h >> 13)) * 0xc2b2ae35U;
    return h ^ (h >> 16);
}

// The best variant that this machine can run, or what use_row_code() has set.
const RowCode & row_code();

// The variants that this machine can run, the best one last.
int32_t n_row_codes();
void use_row_code(int32_t index);

} // namespace sllm
