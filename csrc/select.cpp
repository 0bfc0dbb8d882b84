// Seeded selection: llama.cpp's samplers leave candidates, position-keyed Gumbel noise picks among them.
//
// Gumbel-max trick: argmax over v of logit(v)/T + G(v), with independent standard Gumbel G, is a sample of softmax(logit/T). Here
// G is a pure function of (seed, position, token), so a draft model that adds the same noise to its own logits picks the same
// token far more often than an independent sample would (the coupling of two distributions by common Gumbel noise), and the text
// does not depend on how the tokens were grouped into batches, or on how often a position was tried.

#include "internal.hpp"
#include "rows.hpp"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <functional>
#include <limits>

namespace {

constexpr float minus_infinity = -std::numeric_limits<float>::infinity();

// The key of the counter-based hash behind G.
constexpr uint64_t key_of(uint64_t seed, int32_t pos) {
    return sllm::mix(sllm::mix(seed + sllm::golden) + sllm::golden * (static_cast<uint32_t>(pos) + 1ULL));
}

// -ln(-ln u) with u = (bits + 1/2) / 2^52, which a double holds exactly and is never 0 or 1.
double gumbel_of(uint64_t bits) {
    const double u = (static_cast<double>(bits) + 0.5) * 0x1p-52;
    return -std::log(-std::log(u));
}

sllm::Choice greedy(const float * logits, int32_t n, bool want_prob) {
    const int32_t token = sllm::index_of_largest(logits, n);
    return {token, want_prob ? static_cast<float>(1.0 / sllm::row_code().sum_exp(logits, n, logits[token])) : 0.0F};
}

// The largest of each group of logits in whole stripes (rows.hpp).
void find_maxima(const float * logits, int32_t n, std::vector<float> & maxima) {
    const int32_t n_stripes = n / sllm::stripe;
    maxima.resize(static_cast<size_t>(n_stripes) * sllm::group_lanes);
    sllm::row_code().maxima(logits, n_stripes, maxima.data());
}

// Gumbel-max over a whole vocabulary. A token can only win if its noise exceeds (best so far) - logit/T, and -ln(-ln u) > x means
// u > exp(-exp(-x)): so for each stripe of tokens one bound on the hash is worked out, and logarithms are taken for the few hashes
// above it.
sllm::Choice gumbel_argmax(const float * logits, int32_t n, double temperature, uint64_t key, bool want_prob) {
    const sllm::RowCode & rows = sllm::row_code();
    int32_t token = sllm::index_of_largest(logits, n);
    const float top = logits[token];
    if (!std::isfinite(top)) {
        sllm::fail_no_candidate();
    }
    double best = static_cast<double>(top) / temperature + gumbel_of(sllm::hash_of(key, token));
    for (int32_t begin = 0; begin < n; begin += sllm::stripe) {
        const int32_t end = std::min(n, begin + sllm::stripe);
        const float stripe_top = rows.largest(logits + begin, end - begin);
        if (stripe_top == minus_infinity) {
            continue;
        }
        const double needed = best - static_cast<double>(stripe_top) / temperature;
        // The margin covers rounding in the two exponentials; a hash at the bound is decided by the exact score below.
        const double u = std::exp(-std::exp(-needed)) - 1e-15;
        const uint64_t bound = u <= 0 ? 0 : static_cast<uint64_t>(u * 0x1p52);
        int32_t v = begin;
        while ((v = rows.search_hash(key, v, end, bound)) < end) {
            for (const int32_t stop = std::min(end, v + sllm::search_step); v < stop; ++v) {
                const uint64_t bits = sllm::hash_of(key, v);
                if (bits < bound) {
                    continue;
                }
                const double score = static_cast<double>(logits[v]) / temperature + gumbel_of(bits);
                if (score > best || (score == best && v < token)) {
                    best = score;
                    token = v;
                }
            }
        }
    }
    float prob = 0;
    if (want_prob) {
        const double total = rows.sum_exp_scaled(logits, n, top, temperature);
        prob = static_cast<float>(std::exp((static_cast<double>(logits[token]) - static_cast<double>(top)) / temperature) / total);
    }
    return {token, prob};
}

bool more_likely(const llama_token_data & a, const llama_token_data & b) { return a.logit != b.logit ? a.logit > b.logit : a.id < b.id; }

// The `k` best, best first.
void keep_best(std::vector<llama_token_data> & candidates, size_t k) {
    if (candidates.size() > k) {
        std::nth_element(candidates.begin(), candidates.begin() + static_cast<std::ptrdiff_t>(k), candidates.end(), more_likely);
        candidates.resize(k);
    }
    std::sort(candidates.begin(), candidates.end(), more_likely);
}

// A number that at least `k` logits reach, as large as the maxima of groups can say, or -inf. Of groups that have nothing in common, k
// have a maximum that is not below the k-th largest maximum, and each of them has a logit that reaches it. Any groups will do, so
// stripes are put together while several times k groups are left: then few have two of the best logits, and there is little to sort.
// Stripes far from each other, because neighbours in a vocabulary may be alike.
float threshold_of_best(const std::vector<float> & maxima, size_t k, std::vector<float> & groups) {
    constexpr size_t n_lanes = sllm::group_lanes;
    const size_t n_left = std::min(maxima.size(), (8 * k + n_lanes - 1) / n_lanes * n_lanes);
    if (n_left < k) {
        return minus_infinity;
    }
    groups.assign(n_left, minus_infinity);
    for (size_t begin = 0; begin < maxima.size(); begin += n_left) {
        const size_t n = std::min(n_left, maxima.size() - begin);
        for (size_t i = 0; i < n; ++i) {
            groups[i] = std::max(groups[i], maxima[begin + i]);
        }
    }
    const auto kth = groups.begin() + static_cast<std::ptrdiff_t>(k - 1);
    std::nth_element(groups.begin(), kth, groups.end(), std::greater<>());
    return *kth;
}

// Candidates out of the logits that reach `threshold`, in the order of their ids; -inf is none. Of those that equal it, the first
// `max_equal` will do, which are at least one.
void collect(const float * logits, int32_t n, const std::vector<float> & maxima, float threshold, size_t max_equal,
             std::vector<llama_token_data> & out) {
    const sllm::RowCode & rows = sllm::row_code();
    out.clear();
    const auto collect_range = [&](int32_t v, int32_t end) {
        while ((v = rows.search(logits, v, end, threshold)) < end) {
            for (const int32_t stop = std::min(end, v + sllm::search_step); v < stop; ++v) {
                if (!(logits[v] >= threshold) || logits[v] == minus_infinity) {
                    continue;
                }
                out.push_back({v, logits[v], 0.0F});
                if (logits[v] == threshold && --max_equal == 0) {
                    threshold = std::nextafter(threshold, std::numeric_limits<float>::infinity());
                }
            }
        }
    };
    const auto n_maxima = static_cast<int32_t>(maxima.size());
    constexpr int32_t n_read = sllm::search_step / sllm::group_lanes; // stripes that one step of a search covers
    int32_t i = 0;
    while ((i = rows.search(maxima.data(), i, n_maxima, threshold)) < n_maxima) {
        const int32_t first = i / sllm::group_lanes; // a search ends at any element of the last stripe
        const int32_t last = std::min(first + n_read, n_maxima / sllm::group_lanes);
        collect_range(first * sllm::stripe, last * sllm::stripe);
        i = last * sllm::group_lanes;
    }
    collect_range(n_maxima / sllm::group_lanes * sllm::stripe, n);
}

void require(bool condition, const char * text) {
    if (!condition) {
        sllm::fail(SLLM_ERR_INVALID, "%s", text);
    }
}

std::unique_ptr<sllm_sampling> compile(const sllm_model & model, const sllm_sampling_params & p) {
    require(std::isfinite(p.temperature) && p.temperature >= 0, "temperature must be a finite number >= 0");
    require(p.top_k >= 0, "top_k must be >= 0 (0: off)");
    require(p.top_p > 0 && p.top_p <= 1, "top_p must be in (0, 1] (1: off)");
    require(p.min_p >= 0 && p.min_p <= 1, "min_p must be in [0, 1] (0: off)");
    require(p.penalty_last_n >= 0, "penalty_last_n must be >= 0 (0: off)");
    require(std::isfinite(p.penalty_repeat) && p.penalty_repeat > 0, "penalty_repeat must be a finite number > 0 (1: off)");
    require(std::isfinite(p.penalty_freq), "penalty_freq must be finite (0: off)");
    require(std::isfinite(p.penalty_present), "penalty_present must be finite (0: off)");
    require(p.n_bias >= 0, "n_bias must be >= 0");

    static std::atomic<uint64_t> next_id{1};
    auto s = std::make_unique<sllm_sampling>();
    s->id = next_id++;
    s->model = model;
    s->temperature = static_cast<double>(p.temperature);
    s->top_k = p.top_k;
    s->top_p = p.top_p;
    s->min_p = p.min_p;
    s->penalty_last_n = p.penalty_last_n;
    s->penalty_repeat = p.penalty_repeat;
    s->penalty_freq = p.penalty_freq;
    s->penalty_present = p.penalty_present;
    s->seed = p.seed;
    for (int32_t i = 0; i < p.n_bias; ++i) {
        if (p.bias_tokens[i] < 0 || p.bias_tokens[i] >= model.n_vocab) {
            sllm::fail(SLLM_ERR_INVALID, "logit_bias names token %d, and the vocabulary has %d tokens", p.bias_tokens[i], model.n_vocab);
        }
        require(!std::isnan(p.bias_values[i]), "a logit bias is NaN");
        s->bias.push_back({p.bias_tokens[i], p.bias_values[i]});
    }
    // Tokens that the model file itself rules out (tokenizer.ggml.suppress_tokens), as llama.cpp's own tools do.
    int32_t n_suppressed = 0;
    const llama_token * suppressed = llama_vocab_get_suppress_tokens(model.vocab, &n_suppressed);
    for (int32_t i = 0; i < n_suppressed; ++i) {
        s->bias.push_back({suppressed[i], minus_infinity});
    }
    if (p.grammar != nullptr) {
        if (llama_vocab_type(model.vocab) == LLAMA_VOCAB_TYPE_NONE) {
            sllm::fail(SLLM_ERR_UNSUPPORTED, "a grammar needs a vocabulary, and the model file holds none");
        }
        if (model.specials->made_up >= 0) {
            sllm::fail(SLLM_ERR_UNSUPPORTED, "a grammar needs a token that ends the text, and the model file names none (EOS)");
        }
        s->grammar = p.grammar;
        s->grammar_user_data = p.grammar_user_data;
    }
    sllm::adopt_noise(*s, p.noise);
    return s;
}

} // namespace

namespace sllm {

void fail_no_candidate() {
    fail(SLLM_ERR_COMPUTE, "no token can be selected: the logits are NaN or -inf, or the grammar and the logit biases leave none");
}

int32_t index_of_largest(const float * logits, int32_t n) {
    const RowCode & rows = row_code();
    constexpr int32_t span = 4096; // small enough to be read again from the nearest cache
    float top = minus_infinity;
    int32_t where = 0;
    for (int32_t begin = 0; begin < n; begin += span) {
        const float span_top = rows.largest(logits + begin, std::min(span, n - begin));
        if (span_top > top) {
            top = span_top;
            where = begin;
        }
    }
    if (top == minus_infinity) {
        fail_no_candidate();
    }
    int32_t index = rows.search(logits, where, n, top);
    while (!(logits[index] >= top)) {
        ++index;
    }
    return index;
}

void top_candidates(const float * logits, int32_t n, size_t k, Scratch & scratch) {
    find_maxima(logits, n, scratch.maxima);
    const float threshold = threshold_of_best(scratch.maxima, k, scratch.groups);
    collect(logits, n, scratch.maxima, threshold, k, scratch.candidates);
    keep_best(scratch.candidates, k);
}

bool is_allowed(const std::vector<uint32_t> & allowed, llama_token token) {
    const auto v = static_cast<uint32_t>(token);
    return ((allowed[v / 32] >> (v % 32)) & 1U) != 0;
}

std::vector<llama_token> checked_history(const sllm_sampling & sampling, const int32_t * history, int32_t pos) {
    require(pos >= 0, "pos must be >= 0");
    const std::vector<llama_token> tokens(history, history + pos);
    for (const llama_token t : tokens) {
        require(t >= 0 && t < sampling.model.n_vocab, "the history holds a token that is not in the vocabulary");
    }
    return tokens;
}

double log_prob(const float * row, int32_t n_vocab, llama_token token) {
    const RowCode & rows = row_code();
    const float top = rows.largest(row, n_vocab);
    return static_cast<double>(row[token]) - static_cast<double>(top) - std::log(rows.sum_exp(row, n_vocab, top));
}

void Selector::begin(const sllm_sampling & s, const std::vector<llama_token> & history, int32_t start) {
    if (sampling_id != s.id) {
        filters.reset();
        penalties.reset();
        recent.clear();
        sampling_id = 0; // until everything below has succeeded
        if (s.has_filters()) {
            filters.reset(llama_sampler_chain_init(llama_sampler_chain_default_params()));
            if (s.top_k > 0) {
                llama_sampler_chain_add(filters.get(), llama_sampler_init_top_k(s.top_k));
            }
            if (s.top_p < 1.0F) {
                llama_sampler_chain_add(filters.get(), llama_sampler_init_top_p(s.top_p, 1));
            }
            if (s.min_p > 0.0F) {
                llama_sampler_chain_add(filters.get(), llama_sampler_init_min_p(s.min_p, 1));
            }
        }
    }
    sampling = &s;

    if (s.has_penalties()) {
        penalties.reset(
            llama_sampler_init_penalties(s.model.n_vocab, s.penalty_last_n, s.penalty_repeat, s.penalty_freq, s.penalty_present));
        const size_t n = std::min(history.size(), static_cast<size_t>(s.penalty_last_n));
        recent.assign(history.end() - static_cast<std::ptrdiff_t>(n), history.end());
        for (const llama_token token : recent) {
            llama_sampler_accept(penalties.get(), token);
        }
    }

    text.clear();
    if (s.grammar != nullptr) {
        const size_t first = std::min(static_cast<size_t>(std::max(start, 0)), history.size());
        text.assign(history.begin() + static_cast<std::ptrdiff_t>(first), history.end());
    }
    sampling_id = s.id;
}

void Selector::accept(llama_token token) {
    if (penalties != nullptr) {
        llama_sampler_accept(penalties.get(), token);
        recent.push_back(token);
    }
    if (sampling->grammar != nullptr) {
        text.push_back(token);
    }
}

Selector Selector::clone() const {
    Selector copy;
    copy.sampling = sampling;
    copy.sampling_id = sampling_id;
    copy.filters.reset(filters == nullptr ? nullptr : llama_sampler_clone(filters.get()));
    copy.penalties.reset(penalties == nullptr ? nullptr : llama_sampler_clone(penalties.get()));
    copy.recent = recent;
    copy.text = text;
    return copy;
}

// The row with biases and penalties, which change few of its logits.
const float * Selector::adjust(const float * logits, Scratch & scratch) const {
    const sllm_sampling & s = *sampling;
    std::vector<float> & row = scratch.row;
    row.assign(logits, logits + s.model.n_vocab);
    for (const llama_logit_bias & bias : s.bias) {
        row[static_cast<size_t>(bias.token)] += bias.bias;
    }
    if (penalties != nullptr) {
        // llama.cpp's sampler looks at each candidate by itself and leaves those alone that it has not seen of late.
        std::vector<llama_token_data> & seen = scratch.candidates;
        seen.clear();
        for (const llama_token token : recent) {
            seen.push_back({token, row[static_cast<size_t>(token)], 0.0F});
        }
        llama_token_data_array array{seen.data(), seen.size(), -1, false};
        llama_sampler_apply(penalties.get(), &array);
        for (const llama_token_data & c : seen) {
            row[static_cast<size_t>(c.id)] = c.logit;
        }
    }
    return row.data();
}

// Which of the candidates, or of the whole vocabulary, the grammar allows next.
void Selector::ask_grammar(bool about_candidates, Scratch & scratch) const {
    const sllm_sampling & s = *sampling;
    scratch.asked.clear();
    if (about_candidates) {
        for (const llama_token_data & c : scratch.candidates) {
            scratch.asked.push_back(c.id);
        }
    }
    scratch.allowed.assign((static_cast<size_t>(s.model.n_vocab) + 31) / 32, 0);
    std::array<char, 512> why{};
    const int said =
        s.grammar(s.grammar_user_data, text.data(), static_cast<int32_t>(text.size()), scratch.asked.data(),
                  static_cast<int32_t>(scratch.asked.size()), scratch.allowed.data(), why.data(), static_cast<int32_t>(why.size()));
    switch (said) {
    case SLLM_ALLOWED_ALL: scratch.all_allowed = true; return;
    case SLLM_ALLOWED_SOME: scratch.all_allowed = false; return;
    case SLLM_ALLOWED_STOPPED: fail(SLLM_ERR_INTERRUPTED, "interrupted while a grammar was asked");
    default: fail(SLLM_ERR_GRAMMAR, "%s", why.data());
    }
}

// llama.cpp's top-p sorts logits into buckets by an integer, which biases and penalties can make overflow: such logits are shifted down
// (filter_all). Neither their order nor their softmax changes.
constexpr float shift_limit = 1e6F;

void tame(std::vector<llama_token_data> & candidates) {
    float top = minus_infinity;
    for (const llama_token_data & c : candidates) {
        top = std::max(top, c.logit);
    }
    if (top > shift_limit) {
        for (llama_token_data & c : candidates) {
            c.logit = c.logit == top ? 0.0F : std::max(c.logit - top, -shift_limit); // infinity less infinity is no number
        }
    } else {
        for (llama_token_data & c : candidates) {
            c.logit = std::max(c.logit, top - 2 * shift_limit);
        }
    }
}

// Where only the likeliest tokens matter, take them straight from the row instead of making candidates of the whole vocabulary. False:
// this selection needs the long way.
bool Selector::filter_shortlist(const float * row, bool changed, bool want_prob, Scratch & scratch) const {
    const sllm_sampling & s = *sampling;
    const bool best_alone = s.temperature == 0 && !want_prob;
    if (!best_alone && (s.top_k <= 0 || s.top_k > 1024 || s.top_k >= s.model.n_vocab || (s.temperature == 0 && changed))) {
        return false;
    }
    const size_t k = best_alone ? 1 : static_cast<size_t>(s.top_k);
    const size_t n = s.grammar == nullptr ? k : std::max(4 * k, size_t{64});
    std::vector<llama_token_data> & candidates = scratch.candidates;
    top_candidates(row, s.model.n_vocab, n, scratch);
    const bool all = candidates.size() < n; // the others are NaN or -inf
    if (changed && !candidates.empty()) {
        const float top = candidates.front().logit;
        if (top > shift_limit) {
            return false;
        }
        for (llama_token_data & c : candidates) {
            c.logit = std::max(c.logit, top - 2 * shift_limit);
        }
    }
    if (s.grammar != nullptr) {
        // Sorted by logit, so if k of these survive the grammar they are the k best survivors of the vocabulary.
        ask_grammar(true, scratch);
        const auto gone = [&](const llama_token_data & c) { return !is_allowed(scratch.allowed, c.id); };
        candidates.erase(std::remove_if(candidates.begin(), candidates.end(), gone), candidates.end());
        if (candidates.size() < k && !all) {
            return false;
        }
    }
    scratch.filtered = {candidates.data(), candidates.size(), -1, true};
    return true;
}

// The same for min-p alone. False: this selection needs another way.
bool Selector::filter_likely(const float * row, Scratch & scratch) const {
    const sllm_sampling & s = *sampling;
    if (s.temperature == 0 || s.top_k > 0 || s.top_p < 1.0F || s.min_p <= 0.0F || s.grammar != nullptr) {
        return false;
    }
    const float top = row[index_of_largest(row, s.model.n_vocab)];
    if (top > shift_limit) {
        return false;
    }
    const float threshold = top + std::log(s.min_p) - 1.0F; // llama.cpp's sampler sees to the exact bound
    find_maxima(row, s.model.n_vocab, scratch.maxima);
    collect(row, s.model.n_vocab, scratch.maxima, threshold, SIZE_MAX, scratch.candidates);
    scratch.filtered = {scratch.candidates.data(), scratch.candidates.size(), -1, false};
    return true;
}

// Everything that the grammar and infinite biases leave, cut to the top k.
void Selector::filter_all(const float * row, Scratch & scratch) const {
    const sllm_sampling & s = *sampling;
    std::vector<llama_token_data> & candidates = scratch.candidates;
    if (s.grammar != nullptr && !scratch.all_allowed) {
        ask_grammar(false, scratch);
    }
    candidates.clear();
    for (int32_t v = 0; v < s.model.n_vocab; ++v) {
        if (s.grammar == nullptr || is_allowed(scratch.allowed, v)) {
            candidates.push_back({v, row[v], 0.0F});
        }
    }
    // What is ruled out must not count as one of the top k; NaN must not reach the sorting samplers.
    const auto gone = [](const llama_token_data & c) { return !(c.logit > minus_infinity); };
    candidates.erase(std::remove_if(candidates.begin(), candidates.end(), gone), candidates.end());

    tame(candidates);
    const bool cut = s.temperature > 0 && s.top_k > 0;
    if (cut) {
        keep_best(candidates, static_cast<size_t>(s.top_k)); // llama.cpp's top-k keeps any of equal ones at the border
    }
    scratch.filtered = {candidates.data(), candidates.size(), -1, cut};
}

// Gumbel-max, or argmax at temperature 0, over what the filters left.
Choice Selector::choose(const llama_token_data_array & filtered, int32_t pos, bool want_prob) const {
    const sllm_sampling & s = *sampling;
    const uint64_t key = key_of(s.seed, pos);
    double best = 0;
    float top = minus_infinity;
    const llama_token_data * chosen = nullptr;
    for (size_t i = 0; i < filtered.size; ++i) {
        const llama_token_data & c = filtered.data[i];
        if (!(c.logit > minus_infinity)) {
            continue;
        }
        top = std::max(top, c.logit);
        const double score =
            s.temperature > 0 ? static_cast<double>(c.logit) / s.temperature + gumbel_of(hash_of(key, c.id)) : static_cast<double>(c.logit);
        if (chosen == nullptr || score > best || (score == best && c.id < chosen->id)) {
            best = score;
            chosen = &c;
        }
    }
    if (chosen == nullptr) {
        fail_no_candidate();
    }
    float prob = 0;
    if (want_prob) {
        const double temperature = s.temperature > 0 ? s.temperature : 1.0;
        double total = 0;
        for (size_t i = 0; i < filtered.size; ++i) {
            total += std::exp((static_cast<double>(filtered.data[i].logit) - static_cast<double>(top)) / temperature);
        }
        prob = static_cast<float>(std::exp((static_cast<double>(chosen->logit) - static_cast<double>(top)) / temperature) / total);
    }
    return {chosen->id, prob};
}

double Selector::score(float logit, int32_t pos, llama_token token) const {
    const sllm_sampling & s = *sampling;
    return s.temperature > 0 ? static_cast<double>(logit) / s.temperature + gumbel_of(hash_of(key_of(s.seed, pos), token))
                             : static_cast<double>(logit);
}

// The first token from `from` on that has a score of `least` or more if its logit is `logit`; the size of the vocabulary if none has. Now
// and then it is one that has a little less.
llama_token Selector::next_reaching(double least, float logit, int32_t pos, llama_token from) const {
    const sllm_sampling & s = *sampling;
    const int32_t n = s.model.n_vocab;
    const double noise = s.temperature > 0 ? least - static_cast<double>(logit) / s.temperature : static_cast<double>(minus_infinity);
    // The margin covers rounding in the exponentials, as in gumbel_argmax().
    const double u = std::exp(-std::exp(-noise)) - 1e-15;
    const uint64_t bound = u > 0 ? static_cast<uint64_t>(u * 0x1p52) : 0;
    const uint64_t key = key_of(s.seed, pos);
    int32_t v = from;
    while ((v = row_code().search_hash(key, v, n, bound)) < n) {
        for (const int32_t stop = std::min(n, v + search_step); v < stop; ++v) {
            if (hash_of(key, v) >= bound) {
                return v;
            }
        }
    }
    return n;
}

std::vector<Ranked> Selector::rank(const float * logits, int32_t pos, size_t n, Scratch & scratch) const {
    const sllm_sampling & s = *sampling;
    const int32_t n_vocab = s.model.n_vocab;
    if (s.noise != SLLM_NOISE_SLLM && s.temperature > 0) {
        return rank_as_engine(s, s.bias.empty() ? logits : adjust(logits, scratch), pos, n, scratch);
    }
    scratch.filtered = {};
    const Choice first = select(logits, pos, true, scratch);
    const bool changed = !s.bias.empty() || penalties != nullptr;
    const float * row = changed ? scratch.row.data() : logits;
    const double temperature = s.temperature > 0 ? s.temperature : 1.0;
    std::vector<Ranked> found{{first.token, first.prob, score(row[first.token], pos, first.token)}};
    const auto prob_of = [&](float logit, float first_logit) {
        const double ratio = std::exp((static_cast<double>(logit) - static_cast<double>(first_logit)) / temperature);
        return static_cast<float>(static_cast<double>(first.prob) * ratio);
    };
    if (scratch.filtered.size > 0) { // the others that the filters and the grammar left, with logits that may be shifted
        const llama_token_data * const begin = scratch.filtered.data;
        const llama_token_data * const end = begin + scratch.filtered.size;
        const float top = std::find_if(begin, end, [&](const llama_token_data & c) { return c.id == first.token; })->logit;
        found.front().score = score(top, pos, first.token);
        for (const llama_token_data * c = begin; c != end; ++c) {
            if (c->id != first.token && c->logit > minus_infinity) {
                found.push_back({c->id, prob_of(c->logit, top), score(c->logit, pos, c->id)});
            }
        }
        const size_t kept = std::min(n, found.size());
        std::partial_sort(
            found.begin() + 1, found.begin() + static_cast<std::ptrdiff_t>(kept), found.end(),
            [](const Ranked & a, const Ranked & b) { return a.score > b.score || (a.score == b.score && a.token < b.token); });
        found.resize(kept);
        return found;
    }
    scratch.without.assign(row, row + n_vocab);
    while (found.size() < n && found.size() < static_cast<size_t>(n_vocab)) {
        scratch.without[static_cast<size_t>(found.back().token)] = minus_infinity;
        const float * left = scratch.without.data();
        if (!(left[index_of_largest(left, n_vocab)] > minus_infinity)) {
            break;
        }
        const llama_token token = s.temperature == 0 ? greedy(left, n_vocab, false).token
                                                     : gumbel_argmax(left, n_vocab, s.temperature, key_of(s.seed, pos), false).token;
        found.push_back({token, prob_of(row[token], row[first.token]), score(row[token], pos, token)});
    }
    return found;
}

Choice Selector::select(const float * logits, int32_t pos, bool want_prob, Scratch & scratch) const {
    const sllm_sampling & s = *sampling;
    const int32_t n_vocab = s.model.n_vocab;
    const bool changed = !s.bias.empty() || penalties != nullptr; // these logits are not the model's own
    const float * row = changed ? adjust(logits, scratch) : logits;
    scratch.all_allowed = false;
    if (s.grammar == nullptr && s.temperature == 0) {
        return greedy(row, n_vocab, want_prob); // top-k, top-p and min-p always keep the likeliest token
    }
    if (s.noise != SLLM_NOISE_SLLM) {
        const Ranked best = rank_as_engine(s, row, pos, 1, scratch).front();
        return {best.token, best.prob};
    }
    if (s.grammar == nullptr && filters == nullptr) {
        // What filter_all() would clamp is far from being selected at such temperatures: the noise is between -4 and 37.
        constexpr double hottest = 1e4;
        if (!changed || (s.temperature <= hottest && row[index_of_largest(row, n_vocab)] <= shift_limit)) {
            return gumbel_argmax(row, n_vocab, s.temperature, key_of(s.seed, pos), want_prob);
        }
    }
    if (!filter_shortlist(row, changed, want_prob, scratch) && !filter_likely(row, scratch)) {
        filter_all(row, scratch);
    }
    if (scratch.filtered.size == 0) {
        fail_no_candidate();
    }
    if (filters != nullptr && s.temperature > 0) {
        llama_sampler_apply(filters.get(), &scratch.filtered);
    }
    return choose(scratch.filtered, pos, want_prob);
}

} // namespace sllm

extern "C" {

int sllm_sampling_new(const sllm_model * model, const struct sllm_sampling_params * params, sllm_sampling ** out) {
    *out = nullptr;
    return sllm::guarded([&] { *out = compile(*model, *params).release(); });
}

void sllm_sampling_free(sllm_sampling * sampling) {
    sllm::guarded([&] { delete sampling; });
}

int sllm_select(const sllm_sampling * sampling, const float * logits, int32_t n_vocab, int32_t pos, const int32_t * history, int32_t start,
                int32_t * token, float * prob) {
    return sllm::guarded([&] {
        if (n_vocab != sampling->model.n_vocab) {
            sllm::fail(SLLM_ERR_INVALID, "the row has %d logits, and the vocabulary %d tokens", n_vocab, sampling->model.n_vocab);
        }
        sllm::Selector selector;
        selector.begin(*sampling, sllm::checked_history(*sampling, history, pos), start);
        sllm::Scratch scratch;
        const sllm::Choice choice = selector.select(logits, pos, prob != nullptr, scratch);
        *token = choice.token;
        if (prob != nullptr) {
            *prob = choice.prob;
        }
    });
}

double sllm_gumbel(uint64_t seed, int32_t pos, int32_t token) { return gumbel_of(sllm::hash_of(key_of(seed, pos), token)); }

int32_t sllm_row_codes(void) { return sllm::n_row_codes(); }

void sllm_use_row_code(int32_t index) { sllm::use_row_code(index); }

} // extern "C"
