// Selection as other engines do it for requests with a seed: their noise, their filters in their order, their arithmetic. Both engines
// add Gumbel noise that is a pure function of the seed, a position and an index, as select.cpp does, and take the largest sum. The position
// is that of the last token that is read, one before the token that is selected. The hash is MurmurHash3 of the seed's two halves, the
// position and the index (rows.hpp), taken for the second one as a number of 32 bits. Written from the formulas; the sources that say them:
//
// vLLM 0.32.0, vllm/v1/worker/gpu/sample/{sampler,states,gumbel,min_p}.py and vllm/v1/sample/ops/topk_topp_triton.py: everything in single
// precision; temperature first, then min-p, top-k, and top-p over what is left; the index is the token; u = (hash + 1/2) / 2^32, and the
// noise is -ln(-ln(1 - u)), so that small hashes win, where u is finely resolved.
//
// SGLang 0.5.23, sglang/srt/layers/sampler.py (top_k_top_p_min_p_sampling_from_probs_torch, multinomial_with_seed): softmax of
// logit / temperature in single precision; all tokens sorted by probability; top-k, and top-p over all of them; the index is the token's
// place in that order, and not the token; u = hash / (2^32 - 1), and the noise is -ln(-ln u), added to the logarithm of the probability in
// double precision. Without any filter it takes the token for the index, unless a request in the same batch has one: such a text depends on
// its neighbours. So the order counts here always, and whoever asks SGLang sends a filter that keeps everything (top_k = all tokens).

#include "internal.hpp"
#include "rows.hpp"

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstdint>
#include <limits>

namespace {

using sllm::Ranked;

constexpr double infinity = std::numeric_limits<double>::infinity();

// What the first three blocks of the hash leave.
constexpr uint32_t murmur_state(uint64_t seed, int32_t pos) {
    const uint32_t low = sllm::murmur_block(0, static_cast<uint32_t>(seed & 0xffffffffU));
    const uint32_t high = sllm::murmur_block(low, static_cast<uint32_t>(seed >> 32));
    return sllm::murmur_block(high, static_cast<uint32_t>(pos) - 1U);
}

// ln(1 - u): its series where u is small, where 1 - u would lose what makes the noise large.
float log_of_rest(float u) {
    if (u >= 0.25F) {
        return std::log(std::max(1.0F - u, 0x1p-24F));
    }
    float sum = 0;
    for (int n = 8; n > 0; --n) {
        sum = 1.0F / static_cast<float>(n) + u * sum;
    }
    return -u * sum;
}

float vllm_gumbel(uint32_t hash) {
    const float high = static_cast<float>(hash >> 16) * 0x1p-16F;
    const float low = (static_cast<float>(hash & 0xffffU) + 0.5F) * 0x1p-32F;
    return -std::log(-log_of_rest(high + low));
}

double sglang_gumbel(uint32_t hash) {
    const double log_u = std::log(static_cast<double>(hash) / 4294967295.0);
    return -std::log(-std::clamp(log_u, -DBL_MAX, -0x1p-32));
}

// So many of the hashes that `state` leaves give more noise than `needed`, those up to the bound, and a few more: the margin covers what
// single precision does to a score. For SGLang: up to the bound with every bit flipped.
uint32_t hash_bound(int32_t noise, double needed) {
    const double share = noise == SLLM_NOISE_VLLM ? -std::expm1(-std::exp(-needed)) : -std::expm1(-std::exp(-needed) * (1 + 1e-9));
    const double bound = std::ceil(share * 0x1p32 * (1 + 1e-6)) + 1;
    return bound >= 0x1p32 ? UINT32_MAX : static_cast<uint32_t>(bound);
}

bool wins(const Ranked & a, const Ranked & b) { return a.score > b.score || (a.score == b.score && a.token < b.token); }

// Keeps the `n` best, best first.
void keep_best(std::vector<Ranked> & found, size_t n) {
    const size_t kept = std::min(n, found.size());
    std::partial_sort(found.begin(), found.begin() + static_cast<std::ptrdiff_t>(kept), found.end(), wins);
    found.resize(kept);
}

// The likeliest tokens of a row, likeliest first, as many as are asked for.
class Likeliest {
  public:
    Likeliest(const sllm_sampling & s, const float * row, sllm::Scratch & room)
        : n_vocab(s.model.n_vocab), temperature(static_cast<float>(s.temperature)), logits(row), scratch(room),
          top(row[sllm::index_of_largest(row, s.model.n_vocab)] / temperature) {
        if (!std::isfinite(top)) {
            sllm::fail_no_candidate();
        }
    }

    // At least `n`, if there are so many. Each call reads the whole row.
    void grow(size_t n) {
        sllm::top_candidates(logits, n_vocab, std::min(n, static_cast<size_t>(n_vocab)), scratch);
        exhausted = n >= static_cast<size_t>(n_vocab) || scratch.candidates.size() < n;
        for (llama_token_data & c : scratch.candidates) {
            c.logit /= temperature;
        }
    }
    size_t size() const { return scratch.candidates.size(); }
    llama_token token(size_t i) const { return scratch.candidates[i].id; }
    float scaled(size_t i) const { return scratch.candidates[i].logit; } // logit / temperature
    float weight(size_t i) const { return std::exp(scaled(i) - top); }
    float largest() const { return top; }

    // The sum of all weights.
    float total() const {
        const float best = logits[sllm::index_of_largest(logits, n_vocab)];
        return static_cast<float>(sllm::row_code().sum_exp_scaled(logits, n_vocab, best, static_cast<double>(temperature)));
    }

    bool exhausted = false;

  private:
    int32_t n_vocab;
    float temperature;
    const float * logits;
    sllm::Scratch & scratch;
    float top;
};

// ---- vLLM

// Gumbel-max over a whole vocabulary, as gumbel_argmax() of select.cpp does it: for each stripe of tokens a bound on the hash, and
// logarithms for the few that reach it.
std::vector<Ranked> rank_all(const sllm_sampling & s, const float * logits, int32_t pos, size_t n) {
    const sllm::RowCode & rows = sllm::row_code();
    const int32_t n_vocab = s.model.n_vocab;
    const auto temperature = static_cast<float>(s.temperature);
    const uint32_t state = murmur_state(s.seed, pos);
    const int32_t likeliest = sllm::index_of_largest(logits, n_vocab);
    const float top = logits[likeliest];
    if (!std::isfinite(top / temperature)) {
        sllm::fail_no_candidate();
    }
    const auto score_of = [&](int32_t v) { return static_cast<double>(logits[v] / temperature + vllm_gumbel(sllm::murmur_of(state, v))); };
    std::vector<Ranked> found{{likeliest, 0, score_of(likeliest)}};
    for (int32_t begin = 0; begin < n_vocab; begin += sllm::stripe) {
        const int32_t end = std::min(n_vocab, begin + sllm::stripe);
        const float stripe_top = rows.largest(logits + begin, end - begin) / temperature;
        if (std::isinf(stripe_top)) {
            continue;
        }
        const double margin = 1e-4 + 1e-6 * std::abs(static_cast<double>(stripe_top));
        const double worst = found.size() < n ? -infinity : found.back().score;
        const uint32_t bound = hash_bound(s.noise, worst - static_cast<double>(stripe_top) - margin);
        int32_t v = begin;
        while ((v = rows.search_murmur(state, v, end, 0, bound)) < end) {
            for (const int32_t stop = std::min(end, v + sllm::search_step); v < stop; ++v) {
                if (sllm::murmur_of(state, v) > bound || v == likeliest || !(logits[v] > -infinity)) {
                    continue;
                }
                const Ranked other{v, 0, score_of(v)};
                if (found.size() < n || wins(other, found.back())) {
                    found.insert(std::upper_bound(found.begin(), found.end(), other, wins), other);
                    found.resize(std::min(n, found.size()));
                }
            }
        }
    }
    const double total = rows.sum_exp_scaled(logits, n_vocab, top, s.temperature);
    for (Ranked & r : found) {
        r.prob = static_cast<float>(std::exp((static_cast<double>(logits[r.token]) - static_cast<double>(top)) / s.temperature) / total);
    }
    return found;
}

// How many of the likeliest tokens vLLM's filters leave.
size_t vllm_survivors(const sllm_sampling & s, Likeliest & likeliest) {
    const size_t limit = s.top_k > 0 ? static_cast<size_t>(s.top_k) : SIZE_MAX;
    const float threshold = s.min_p > 0 ? likeliest.largest() + std::log(s.min_p) : -std::numeric_limits<float>::infinity();
    for (size_t n = std::min(limit, size_t{256});; n *= 16) {
        likeliest.grow(n);
        size_t kept = std::min(limit, likeliest.size());
        bool complete = kept == limit || likeliest.exhausted;
        while (kept > 1 && likeliest.scaled(kept - 1) < threshold) {
            --kept;
            complete = true;
        }
        if (s.top_p >= 1) {
            if (complete) {
                return kept;
            }
            continue;
        }
        double total = 0;
        if (complete) {
            for (size_t i = 0; i < kept; ++i) {
                total += static_cast<double>(likeliest.weight(i));
            }
        } else if (s.min_p > 0) {
            continue; // the sum of what is left is not known yet
        } else {
            total = static_cast<double>(likeliest.total());
        }
        double sum = 0;
        for (size_t i = 0; i < kept; ++i) {
            sum += static_cast<double>(likeliest.weight(i) / static_cast<float>(total));
            if (sum >= static_cast<double>(s.top_p)) {
                return i + 1;
            }
        }
        if (complete) {
            return kept;
        }
    }
}

std::vector<Ranked> rank_vllm(const sllm_sampling & s, const float * logits, int32_t pos, size_t n, sllm::Scratch & scratch) {
    if (!s.has_filters()) {
        return rank_all(s, logits, pos, n);
    }
    Likeliest likeliest(s, logits, scratch);
    const size_t n_kept = vllm_survivors(s, likeliest);
    const uint32_t state = murmur_state(s.seed, pos);
    std::vector<Ranked> found;
    found.reserve(n_kept);
    double total = 0;
    for (size_t i = 0; i < n_kept; ++i) {
        const float noise = vllm_gumbel(sllm::murmur_of(state, likeliest.token(i)));
        found.push_back({likeliest.token(i), likeliest.weight(i), static_cast<double>(likeliest.scaled(i) + noise)});
        total += static_cast<double>(likeliest.weight(i));
    }
    keep_best(found, n);
    for (Ranked & r : found) {
        r.prob = static_cast<float>(static_cast<double>(r.prob) / total);
    }
    return found;
}

// ---- SGLang

std::vector<Ranked> rank_sglang(const sllm_sampling & s, const float * logits, int32_t pos, size_t n, sllm::Scratch & scratch) {
    Likeliest likeliest(s, logits, scratch);
    const auto n_vocab = static_cast<size_t>(s.model.n_vocab);
    const size_t limit = s.top_k > 0 ? std::min(static_cast<size_t>(s.top_k), n_vocab) : n_vocab;
    const uint32_t state = murmur_state(s.seed, pos);
    const float total = likeliest.total();
    std::vector<Ranked> found;
    for (size_t size = std::min(limit, size_t{256});; size *= 16) {
        likeliest.grow(size);
        // Sorted by probability, whose rounding makes some logits equal.
        std::vector<std::pair<float, llama_token>> sorted;
        for (size_t i = 0; i < std::min(likeliest.size(), limit); ++i) {
            sorted.emplace_back(likeliest.weight(i) / total, likeliest.token(i));
        }
        std::stable_sort(sorted.begin(), sorted.end(),
                         [](const auto & a, const auto & b) { return a.first > b.first || (a.first == b.first && a.second < b.second); });
        found.clear();
        bool complete = sorted.size() == limit || likeliest.exhausted;
        double sum = 0;
        double kept = 0;
        for (size_t i = 0; i < sorted.size(); ++i) {
            const float prob = sorted[i].first;
            sum += static_cast<double>(prob);
            if (prob == 0 || static_cast<float>(sum) - prob > s.top_p) {
                complete = true;
                break;
            }
            kept += static_cast<double>(prob);
            const double noise = sglang_gumbel(sllm::murmur_of(state, static_cast<int32_t>(i)));
            found.push_back({sorted[i].second, prob, std::log(static_cast<double>(prob)) + noise});
        }
        keep_best(found, n);
        if (!complete && found.size() == std::min(n, limit)) {
            // Those behind are no likelier than the last one of these, and the noise of their places is known.
            const double needed = found.back().score - std::log(static_cast<double>(sorted.back().first));
            const auto end = static_cast<int32_t>(limit);
            const uint32_t bound = hash_bound(s.noise, needed);
            int32_t i = static_cast<int32_t>(sorted.size());
            i = sllm::row_code().search_murmur(state, i, end, UINT32_MAX, bound);
            complete = i == end;
        }
        if (complete) {
            if (s.top_k == 0 && s.top_p >= 1) {
                kept = 1;
            }
            for (Ranked & r : found) {
                r.prob = static_cast<float>(static_cast<double>(r.prob) / kept);
            }
            return found;
        }
    }
}

} // namespace

namespace sllm {

void adopt_noise(sllm_sampling & s, int32_t noise) {
    if (noise == SLLM_NOISE_SLLM) {
        return;
    }
    if (noise != SLLM_NOISE_VLLM && noise != SLLM_NOISE_SGLANG) {
        fail(SLLM_ERR_INVALID, "noise is %d, expected a value of sllm_noise", noise);
    }
    const char * engine = noise == SLLM_NOISE_VLLM ? "vLLM" : "SGLang";
    if (s.has_penalties() || s.grammar != nullptr) {
        fail(SLLM_ERR_INVALID, "the noise of %s goes with no penalties and no grammar, which it has in another way", engine);
    }
    if (s.seed > static_cast<uint64_t>(INT64_MAX)) {
        fail(SLLM_ERR_INVALID, "%s takes seeds below 2^63", engine);
    }
    if (noise == SLLM_NOISE_SGLANG && s.min_p > 0 && s.temperature > 0) {
        fail(SLLM_ERR_INVALID, "SGLang selects by a seed with min_p 0 alone");
    }
    s.noise = noise;
    // What the engines make of a temperature that is almost 0.
    if (noise == SLLM_NOISE_VLLM && s.temperature > 0) {
        s.temperature = std::max(s.temperature, static_cast<double>(0.01F));
    } else if (noise == SLLM_NOISE_SGLANG && s.temperature < 1e-6) {
        s.temperature = 0;
    }
}

std::vector<Ranked> rank_as_engine(const sllm_sampling & s, const float * logits, int32_t pos, size_t n, Scratch & scratch) {
    return s.noise == SLLM_NOISE_VLLM ? rank_vllm(s, logits, pos, n, scratch) : rank_sglang(s, logits, pos, n, scratch);
}

} // namespace sllm

extern "C" double sllm_engine_gumbel(int32_t noise, uint64_t seed, int32_t pos, int32_t index) {
    const uint32_t hash = sllm::murmur_of(murmur_state(seed, pos), index);
    switch (noise) {
    case SLLM_NOISE_VLLM: return static_cast<double>(vllm_gumbel(hash));
    case SLLM_NOISE_SGLANG: return sglang_gumbel(hash);
    default: return std::numeric_limits<double>::quiet_NaN();
    }
}
