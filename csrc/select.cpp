// Seeded selection: llama.cpp's samplers leave candidates, position-keyed Gumbel noise picks among them.
//
// Gumbel-max trick: argmax over v of logit(v)/T + G(v), with independent standard Gumbel G, is a sample of softmax(logit/T). Here
// G is a pure function of (seed, position, token), so a draft model that adds the same noise to its own logits picks the same
// token far more often than an independent sample would (the coupling of two distributions by common Gumbel noise), and the text
// does not depend on how the tokens were grouped into batches, or on how often a position was tried.

#include "internal.hpp"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <limits>

namespace {

constexpr float minus_infinity = -std::numeric_limits<float>::infinity();

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

// The counter-based hash behind G: 52 random bits for each (seed, pos, token).
constexpr uint64_t key_of(uint64_t seed, int32_t pos) { return mix(mix(seed + golden) + golden * (static_cast<uint32_t>(pos) + 1ULL)); }
constexpr uint64_t bits_of(uint64_t key, int32_t token) { return mix(key + golden * (static_cast<uint32_t>(token) + 1ULL)) >> 12; }

// -ln(-ln u) with u = (bits + 1/2) / 2^52, which a double holds exactly and is never 0 or 1.
double gumbel_of(uint64_t bits) {
    const double u = (static_cast<double>(bits) + 0.5) * 0x1p-52;
    return -std::log(-std::log(u));
}

// exp(x) for x <= 0 to about 2e-7, written so that compilers turn a loop of it into vector code; std::exp is a call for each
// element.
inline float exp_negative(float x) {
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

constexpr int32_t block = 16; // elements that a loop body handles at once

// The largest logit. NaN never wins.
float largest(const float * logits, int32_t n) {
    float lanes[block];
    std::fill(lanes, lanes + block, minus_infinity);
    int32_t i = 0;
    for (; i + block <= n; i += block) {
        for (int32_t j = 0; j < block; ++j) {
            lanes[j] = logits[i + j] > lanes[j] ? logits[i + j] : lanes[j];
        }
    }
    float best = *std::max_element(lanes, lanes + block);
    for (; i < n; ++i) {
        best = logits[i] > best ? logits[i] : best;
    }
    return best;
}

// Sum of exp(logit - top): every term is at most 1, and the whole is good to about 1e-6.
double sum_exp(const float * logits, int32_t n, float top) {
    double total = 0;
    for (int32_t begin = 0; begin < n; begin += 4096) { // single-precision sums stay short
        const int32_t end = std::min(n, begin + 4096);
        float lanes[block] = {};
        int32_t i = begin;
        for (; i + block <= end; i += block) {
            for (int32_t j = 0; j < block; ++j) {
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

[[noreturn]] void fail_no_candidate() {
    sllm::fail(SLLM_ERR_COMPUTE, "no token can be selected: the logits are NaN or -inf, or the grammar and the logit biases leave none");
}

int32_t first_equal(const float * logits, int32_t n, float value) {
    int32_t begin = 0;
    for (; begin + block <= n; begin += block) { // a search that may end at any element is no vector code
        bool any = false;
        for (int32_t j = 0; j < block; ++j) {
            any |= logits[begin + j] == value;
        }
        if (any) {
            break;
        }
    }
    return static_cast<int32_t>(std::find(logits + begin, logits + n, value) - logits);
}

sllm::Choice greedy(const float * logits, int32_t n, bool want_prob) {
    const float top = largest(logits, n);
    if (top == minus_infinity) {
        fail_no_candidate();
    }
    const float prob = want_prob ? static_cast<float>(1.0 / sum_exp(logits, n, top)) : 0.0F;
    return {first_equal(logits, n, top), prob};
}

// Gumbel-max over a whole vocabulary. A token can only win if its noise exceeds (best so far) - logit/T, and -ln(-ln u) > x means
// u > exp(-exp(-x)): so for each block of tokens one bound on the hash is worked out, and logarithms are taken for the few hashes
// above it.
sllm::Choice gumbel_argmax(const float * logits, int32_t n, double temperature, uint64_t key, bool want_prob) {
    const float top = largest(logits, n);
    if (!std::isfinite(top)) {
        fail_no_candidate();
    }
    int32_t token = first_equal(logits, n, top);
    double best = static_cast<double>(top) / temperature + gumbel_of(bits_of(key, token));
    constexpr int32_t span = 64;
    for (int32_t begin = 0; begin < n; begin += span) {
        const int32_t end = std::min(n, begin + span);
        const float block_top = largest(logits + begin, end - begin);
        if (block_top == minus_infinity) {
            continue;
        }
        const double needed = best - static_cast<double>(block_top) / temperature;
        // The margin covers rounding in the two exponentials; a hash at the bound is decided by the exact score below.
        const double u = std::exp(-std::exp(-needed)) - 1e-15;
        const uint64_t bound = u <= 0 ? 0 : static_cast<uint64_t>(u * 0x1p52);
        for (int32_t v = begin; v < end; ++v) {
            const uint64_t bits = bits_of(key, v);
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
    float prob = 0;
    if (want_prob) {
        double total = 0;
        for (int32_t v = 0; v < n; ++v) {
            total += static_cast<double>(
                exp_negative(static_cast<float>((static_cast<double>(logits[v]) - static_cast<double>(top)) / temperature)));
        }
        prob = static_cast<float>(std::exp((static_cast<double>(logits[token]) - static_cast<double>(top)) / temperature) / total);
    }
    return {token, prob};
}

bool more_likely(const llama_token_data & a, const llama_token_data & b) { return a.logit != b.logit ? a.logit > b.logit : a.id < b.id; }

// The `k` largest logits, largest first; equal ones in the order of their ids.
void top_candidates(const float * logits, int32_t n, size_t k, std::vector<llama_token_data> & out) {
    // A heap with the least likely kept candidate in front; a block whose largest logit is below that one is passed over whole.
    out.clear();
    float threshold = minus_infinity;
    for (int32_t begin = 0; begin < n; begin += block) {
        const int32_t end = std::min(n, begin + block);
        if (out.size() == k) {
            bool any = false;
            for (int32_t v = begin; v < end; ++v) {
                any |= logits[v] > threshold;
            }
            if (!any) {
                continue;
            }
        }
        for (int32_t v = begin; v < end; ++v) {
            if (out.size() == k) {
                if (!(logits[v] > threshold)) {
                    continue;
                }
                std::pop_heap(out.begin(), out.end(), more_likely);
                out.pop_back();
            } else if (std::isnan(logits[v])) {
                continue;
            }
            out.push_back({v, logits[v], 0.0F});
            std::push_heap(out.begin(), out.end(), more_likely);
            threshold = out.size() == k ? out.front().logit : minus_infinity;
        }
    }
    std::sort_heap(out.begin(), out.end(), more_likely);
}

void require(bool condition, const char * text) {
    if (!condition) {
        sllm::fail(SLLM_ERR_INVALID, "%s", text);
    }
}

bool is_prefix(const std::vector<llama_token> & prefix, const llama_token * tokens, size_t n) {
    return prefix.size() <= n && std::equal(prefix.begin(), prefix.end(), tokens);
}

void accept_in_grammar(llama_sampler * grammar, const llama_vocab * vocab, llama_token token) {
    if (llama_vocab_is_eog(vocab, token)) {
        // llama.cpp aborts on an end that the grammar does not allow: ask first.
        llama_token_data data{token, 0.0F, 0.0F};
        llama_token_data_array one{&data, 1, -1, false};
        llama_sampler_apply(grammar, &one);
        if (data.logit == minus_infinity) {
            sllm::fail(SLLM_ERR_GRAMMAR, "the generated text ends where the grammar does not allow it");
        }
    }
    try {
        llama_sampler_accept(grammar, token);
    } catch (const sllm::Error &) {
        throw;
    } catch (const std::exception & error) {
        sllm::fail(SLLM_ERR_GRAMMAR, "the generated text does not match the grammar: %s", error.what());
    }
}

// Behind spaces, line ends and comments, as llama.cpp's grammar parser skips them.
const char * skip_space(const char * p) {
    while (*p == ' ' || *p == '\t' || *p == '\r' || *p == '\n' || *p == '#') {
        if (*p == '#') {
            while (*p != '\0' && *p != '\n') {
                ++p;
            }
        } else {
            ++p;
        }
    }
    return p;
}

// Refuses grammars that llama.cpp's parser, which recurses without a limit and does not compare the bounds of {m,n}, would not
// survive.
void check_grammar(const char * text) {
    constexpr int max_depth = 256;
    constexpr int max_rules = 4096;
    int depth = 0;
    int rules = 0;
    for (const char * p = text; *p != '\0'; ++p) {
        if (*p == '#') { // a comment
            while (p[1] != '\0' && p[1] != '\n') {
                ++p;
            }
        } else if (*p == '"' || *p == '[') { // a literal or a character class
            const char close = *p == '"' ? '"' : ']';
            for (++p; *p != '\0' && *p != close; ++p) {
                if (*p == '\\' && p[1] != '\0') {
                    ++p;
                }
            }
            if (*p == '\0') {
                return; // unterminated: the parser says so
            }
        } else if (*p == '(') {
            if (++depth > max_depth) {
                sllm::fail(SLLM_ERR_GRAMMAR, "the grammar nests more than %d levels deep", max_depth);
            }
        } else if (*p == ')') {
            --depth;
        } else if (*p == ':' && p[1] == ':' && p[2] == '=') {
            if (++rules > max_rules) {
                sllm::fail(SLLM_ERR_GRAMMAR, "the grammar has more than %d rules", max_rules);
            }
        } else if (*p == '{') {
            const char * at = p + 1;
            char * end = nullptr;
            const unsigned long long low = std::strtoull(skip_space(at), &end, 10);
            at = skip_space(end);
            if (*at == ',') {
                at = skip_space(at + 1);
                const unsigned long long high = std::strtoull(at, &end, 10);
                if (end != at && high < low) {
                    sllm::fail(SLLM_ERR_GRAMMAR, "the grammar repeats something at least %llu and at most %llu times", low, high);
                }
            }
        }
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
        require(*p.grammar != '\0', "the grammar is empty");
        check_grammar(p.grammar);
        s->grammar.reset(llama_sampler_init_grammar(model.vocab, p.grammar, "root"));
        if (s->grammar == nullptr) {
            const std::string lines = sllm::Guard::logged_errors();
            sllm::fail(SLLM_ERR_GRAMMAR, "the grammar does not parse: %s", lines.empty() ? "it needs a rule named root" : lines.c_str());
        }
    }
    return s;
}

} // namespace

namespace sllm {

double log_prob(const float * row, int32_t n_vocab, llama_token token) {
    const float top = largest(row, n_vocab);
    return static_cast<double>(row[token]) - static_cast<double>(top) - std::log(sum_exp(row, n_vocab, top));
}

void Selector::begin(const sllm_sampling & s, const std::vector<llama_token> & history, int32_t start) {
    if (sampling_id != s.id) {
        filters.reset();
        penalties.reset();
        grammar.reset();
        parsed.clear();
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
        for (size_t i = history.size() - n; i < history.size(); ++i) {
            llama_sampler_accept(penalties.get(), history[i]);
        }
    }

    if (s.grammar != nullptr) {
        const size_t first = std::min(static_cast<size_t>(std::max(start, 0)), history.size());
        const llama_token * text = history.data() + first;
        const size_t n_text = history.size() - first;
        if (sampling_id != s.id || grammar == nullptr || grammar_start != start || !is_prefix(parsed, text, n_text)) {
            grammar.reset(llama_sampler_clone(s.grammar.get()));
            grammar_start = start;
            parsed.clear();
        }
        while (parsed.size() < n_text) {
            const llama_token token = text[parsed.size()];
            SamplerPtr ahead(llama_sampler_clone(grammar.get())); // a token that does not fit must not spoil the state
            accept_in_grammar(ahead.get(), s.model.vocab, token);
            grammar = std::move(ahead);
            parsed.push_back(token);
        }
    }
    sampling_id = s.id;
}

void Selector::accept(llama_token token) {
    if (penalties != nullptr) {
        llama_sampler_accept(penalties.get(), token);
    }
    if (grammar != nullptr) {
        accept_in_grammar(grammar.get(), sampling->model.vocab, token);
        parsed.push_back(token);
    }
}

Selector Selector::clone() const {
    Selector copy;
    copy.sampling = sampling;
    copy.sampling_id = sampling_id;
    copy.filters.reset(filters == nullptr ? nullptr : llama_sampler_clone(filters.get()));
    copy.penalties.reset(penalties == nullptr ? nullptr : llama_sampler_clone(penalties.get()));
    copy.grammar.reset(grammar == nullptr ? nullptr : llama_sampler_clone(grammar.get()));
    copy.grammar_start = grammar_start;
    copy.parsed = parsed;
    return copy;
}

// With a top-k, only the likeliest tokens matter: take them straight from the logits instead of making candidates of the whole
// vocabulary. False: this selection needs the long way.
bool Selector::filter_shortlist(const float * logits) {
    const sllm_sampling & s = *sampling;
    if (!s.bias.empty() || penalties != nullptr || s.top_k <= 0 || s.top_k > 1024 || s.top_k >= s.model.n_vocab) {
        return false;
    }
    const auto k = static_cast<size_t>(s.top_k);
    const size_t n = grammar == nullptr ? k : std::min(std::max(4 * k, size_t{64}), static_cast<size_t>(s.model.n_vocab));
    top_candidates(logits, s.model.n_vocab, n, candidates);
    filtered = {candidates.data(), candidates.size(), -1, true};
    if (grammar != nullptr) {
        // Sorted by logit, so if k of these survive the grammar they are the k best survivors of the vocabulary.
        llama_sampler_apply(grammar.get(), &filtered);
        const auto gone = [](const llama_token_data & c) { return c.logit == minus_infinity; };
        candidates.erase(std::remove_if(candidates.begin(), candidates.end(), gone), candidates.end());
        if (candidates.size() < k && n < static_cast<size_t>(s.model.n_vocab)) {
            return false;
        }
        filtered = {candidates.data(), candidates.size(), -1, true};
    }
    return true;
}

void Selector::filter_all(const float * logits) {
    const sllm_sampling & s = *sampling;
    candidates.resize(static_cast<size_t>(s.model.n_vocab));
    for (int32_t v = 0; v < s.model.n_vocab; ++v) {
        candidates[static_cast<size_t>(v)] = {v, logits[v], 0.0F};
    }
    for (const llama_logit_bias & bias : s.bias) {
        candidates[static_cast<size_t>(bias.token)].logit += bias.bias;
    }
    filtered = {candidates.data(), candidates.size(), -1, false};
    if (penalties != nullptr) {
        llama_sampler_apply(penalties.get(), &filtered);
    }
    if (grammar != nullptr) {
        llama_sampler_apply(grammar.get(), &filtered);
    }
    // What is ruled out must not count as one of the top k; NaN must not reach the sorting samplers.
    const auto gone = [](const llama_token_data & c) { return !(c.logit > minus_infinity); };
    candidates.erase(std::remove_if(candidates.begin(), candidates.end(), gone), candidates.end());
    filtered = {candidates.data(), candidates.size(), -1, false};

    // llama.cpp's top-p sorts logits into buckets by an integer, which biases and penalties can make overflow: shift such logits down. Neither
    // their order nor their softmax changes.
    constexpr float limit = 1e6F;
    float top = minus_infinity;
    for (const llama_token_data & c : candidates) {
        top = std::max(top, c.logit);
    }
    if (top > limit) {
        for (llama_token_data & c : candidates) {
            c.logit = std::max(c.logit - top, -limit);
        }
    } else {
        for (llama_token_data & c : candidates) {
            c.logit = std::max(c.logit, top - 2 * limit);
        }
    }
}

// Gumbel-max, or argmax at temperature 0, over what the filters left.
Choice Selector::choose(int32_t pos, bool want_prob) const {
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
            s.temperature > 0 ? static_cast<double>(c.logit) / s.temperature + gumbel_of(bits_of(key, c.id)) : static_cast<double>(c.logit);
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

Choice Selector::select(const float * logits, int32_t pos, bool want_prob) {
    const sllm_sampling & s = *sampling;
    const bool unchanged = s.bias.empty() && penalties == nullptr && grammar == nullptr; // the logits are the model's own
    if (unchanged && s.temperature == 0) {
        return greedy(logits, s.model.n_vocab, want_prob); // top-k, top-p and min-p always keep the likeliest token
    }
    if (unchanged && filters == nullptr) {
        return gumbel_argmax(logits, s.model.n_vocab, s.temperature, key_of(s.seed, pos), want_prob);
    }
    if (!filter_shortlist(logits)) {
        filter_all(logits);
    }
    if (filtered.size == 0) {
        fail_no_candidate();
    }
    if (filters != nullptr && s.temperature > 0) {
        llama_sampler_apply(filters.get(), &filtered);
    }
    return choose(pos, want_prob);
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
        require(pos >= 0, "pos must be >= 0");
        const std::vector<llama_token> tokens(history, history + pos);
        for (const llama_token t : tokens) {
            require(t >= 0 && t < n_vocab, "the history holds a token that is not in the vocabulary");
        }
        sllm::Selector selector;
        selector.begin(*sampling, tokens, start);
        const sllm::Choice choice = selector.select(logits, pos, prob != nullptr);
        *token = choice.token;
        if (prob != nullptr) {
            *prob = choice.prob;
        }
    });
}

double sllm_gumbel(uint64_t seed, int32_t pos, int32_t token) { return gumbel_of(bits_of(key_of(seed, pos), token)); }

} // extern "C"
