// Selection from the likeliest tokens of a row alone: the token that the whole row would give, or the statement that it takes more.
//
// A serving engine gives the log-probabilities of the K likeliest tokens of a position. That is enough wherever no other token can be the
// one selected. What is known of the others: none is likelier than the K-th, and together they have the mass that the K leave. Their
// noise is known exactly, since it depends on nothing but seed, position and token.

#include "internal.hpp"
#include "rows.hpp"

#include <algorithm>
#include <cmath>
#include <limits>

namespace {

constexpr float minus_infinity = -std::numeric_limits<float>::infinity();

// What rounding may have moved: in the probabilities that an engine prints, and in the sums in float over a whole vocabulary by which
// llama.cpp's top-p draws its border.
constexpr double mass_slack = 1e-5;
constexpr double border_slack = 1e-4;

enum class Survives { no, perhaps, yes };

Survives both(Survives a, Survives b) { return std::min(a, b); }

// A token that is not among the K, and whose logit is changed by biases or penalties to `upper` at most.
struct Changed {
    llama_token token;
    float upper;
};

// The likeliest first, equal ones in the order of their ids.
bool more_likely(const llama_token_data & a, const llama_token_data & b) { return a.logit != b.logit ? a.logit > b.logit : a.id < b.id; }

} // namespace

namespace sllm {

// What is known of a position.
struct Selector::Shortlist {
    std::vector<llama_token_data> known; // what is among the K and may be selected, changed and sorted
    std::vector<llama_token> ids;        // of all K, sorted
    std::vector<Changed> changed;        // not among the K
    std::vector<llama_token> excluded;   // not among the K, and ruled out by a bias; sorted
    float bound = minus_infinity;        // of the logits of all others
    double rest = 0;                     // their mass, before anything was changed
    bool has_others = true;              // whether there are any
    bool grammar_asked = false;          // about the whole vocabulary
};

Selector::Shortlist Selector::shortlist(const int32_t * tokens, const float * logprobs, int32_t n, Scratch & scratch) const {
    const sllm_sampling & s = *sampling;
    Shortlist list;
    double mass = 0;
    list.bound = std::numeric_limits<float>::infinity();
    for (int32_t i = 0; i < n; ++i) {
        if (tokens[i] < 0 || tokens[i] >= s.model.n_vocab || std::isnan(logprobs[i]) || logprobs[i] > 1e-3F) {
            fail(SLLM_ERR_INVALID, "token %d has the log-probability %g, expected a token of the vocabulary of %d and a number <= 0",
                 tokens[i], static_cast<double>(logprobs[i]), s.model.n_vocab);
        }
        list.known.push_back({tokens[i], logprobs[i], logprobs[i]}); // `p`: what the engine said
        list.ids.push_back(tokens[i]);
        list.bound = std::min(list.bound, logprobs[i]);
        mass += std::exp(static_cast<double>(logprobs[i]));
    }
    std::sort(list.ids.begin(), list.ids.end());
    if (std::adjacent_find(list.ids.begin(), list.ids.end()) != list.ids.end()) {
        fail(SLLM_ERR_INVALID, "a token is named twice among the likeliest of a position");
    }
    if (!(mass <= 1.001)) {
        fail(SLLM_ERR_INVALID, "the probabilities of a position sum to %g, expected log-probabilities of at most 1 in all", mass);
    }
    list.has_others = n < s.model.n_vocab && list.bound > minus_infinity;
    list.rest = std::max(0.0, 1.0 - mass);

    // Biases and penalties change the logits of a few tokens, of which some may not be among the K: for these, the bound is changed.
    const auto is_known = [&](llama_token token) { return std::binary_search(list.ids.begin(), list.ids.end(), token); };
    std::vector<llama_token_data> outside;
    const auto outside_of = [&](llama_token token) -> llama_token_data & {
        const auto found = std::find_if(outside.begin(), outside.end(), [&](const llama_token_data & c) { return c.id == token; });
        if (found != outside.end()) {
            return *found;
        }
        outside.push_back({token, list.bound, 0.0F});
        return outside.back();
    };
    for (const llama_logit_bias & bias : s.bias) {
        if (is_known(bias.token)) {
            std::find_if(list.known.begin(), list.known.end(), [&](const llama_token_data & c) { return c.id == bias.token; })->logit +=
                bias.bias;
        } else if (list.has_others) {
            outside_of(bias.token).logit += bias.bias;
        }
    }
    if (penalties != nullptr) {
        if (list.has_others) {
            for (const llama_token token : recent) {
                if (!is_known(token)) {
                    outside_of(token);
                }
            }
        }
        for (std::vector<llama_token_data> * some : {&list.known, &outside}) {
            llama_token_data_array array{some->data(), some->size(), -1, false};
            llama_sampler_apply(penalties.get(), &array);
        }
    }
    for (const llama_token_data & c : outside) {
        if (c.logit > minus_infinity) {
            list.changed.push_back({c.id, c.logit});
        } else {
            list.excluded.push_back(c.id);
        }
    }
    std::sort(list.excluded.begin(), list.excluded.end());

    if (s.grammar != nullptr) {
        scratch.candidates = list.known;
        ask_grammar(true, scratch);
        const auto gone = [&](const llama_token_data & c) { return !is_allowed(scratch.allowed, c.id); };
        list.known.erase(std::remove_if(list.known.begin(), list.known.end(), gone), list.known.end());
    }
    const auto ruled_out = [](const llama_token_data & c) { return !(c.logit > minus_infinity); };
    list.known.erase(std::remove_if(list.known.begin(), list.known.end(), ruled_out), list.known.end());
    std::sort(list.known.begin(), list.known.end(), more_likely);
    return list;
}

// Whether the grammar allows a token; the first question about one that is not among the K asks about all of them.
bool Selector::may_follow(llama_token token, Shortlist & list, Scratch & scratch) const {
    if (sampling->grammar == nullptr || scratch.all_allowed) {
        return true;
    }
    if (!list.grammar_asked) {
        ask_grammar(false, scratch);
        list.grammar_asked = true;
    }
    return is_allowed(scratch.allowed, token);
}

// Whether some token that is not among the K may have a score of `least` or more, given the largest logit that it could have.
bool Selector::another_reaches(double least, int32_t pos, Shortlist & list, Scratch & scratch) const {
    const sllm_sampling & s = *sampling;
    if (!list.has_others) {
        return false;
    }
    for (const Changed & c : list.changed) {
        if (score(c.upper, pos, c.token) >= least && may_follow(c.token, list, scratch)) {
            return true;
        }
    }
    const auto apart = [&](llama_token token) {
        return std::binary_search(list.ids.begin(), list.ids.end(), token) ||
               std::binary_search(list.excluded.begin(), list.excluded.end(), token) ||
               std::any_of(list.changed.begin(), list.changed.end(), [&](const Changed & c) { return c.token == token; });
    };
    llama_token token = -1;
    while ((token = next_reaching(least, list.bound, pos, token + 1)) < s.model.n_vocab) {
        if (!apart(token) && may_follow(token, list, scratch)) {
            return true;
        }
    }
    return false;
}

// Whether a token that is not among the K may follow at all.
bool Selector::another_may_follow(Shortlist & list, Scratch & scratch) const {
    return list.has_others && another_reaches(-std::numeric_limits<double>::infinity(), 0, list, scratch);
}

// How many of the known tokens are sure to be the likeliest ones: no other can come before them. Where the last of the K are as likely as
// the next one, the engine has said which come first.
size_t Selector::n_ranked(const Shortlist & list) {
    const auto behind = [&](const llama_token_data & c) {
        const bool lowered = c.logit == list.bound && c.p != c.logit;
        return list.has_others && (c.logit < list.bound || lowered ||
                                   std::any_of(
                                       list.changed.begin(), list.changed.end(),
                                       [&](const Changed & other) { return other.upper > list.bound && other.upper >= c.logit; }));
    };
    return static_cast<size_t>(std::find_if(list.known.begin(), list.known.end(), behind) - list.known.begin());
}

// With another engine's noise: where all that survive its filters are known. What else is known of the others' noise is not used.
Selector::Certified Selector::known_as_engine(const Shortlist & list, int32_t pos, Scratch & scratch) const {
    const sllm_sampling & s = *sampling;
    size_t n_kept = list.known.size();
    if (n_kept == 0) {
        return {-1, SLLM_UNDECIDED};
    }
    if (list.has_others) {
        const size_t ranked = n_ranked(list);
        const auto k = static_cast<size_t>(s.top_k);
        float upper = list.bound;
        for (const Changed & c : list.changed) {
            upper = std::max(upper, c.upper);
        }
        const bool likely = s.noise == SLLM_NOISE_VLLM && s.min_p > 0 &&
                            static_cast<double>(upper) < static_cast<double>(list.known.front().logit) +
                                                             s.temperature * std::log(static_cast<double>(s.min_p)) - border_slack;
        if (!likely && !(k > 0 && k <= ranked)) {
            return {-1, SLLM_UNDECIDED};
        }
        n_kept = likely ? n_kept : k;
        if (s.noise == SLLM_NOISE_SGLANG && s.top_p < 1) {
            return {-1, SLLM_UNDECIDED}; // a share of all tokens, at this temperature
        }
    }
    scratch.row.assign(static_cast<size_t>(s.model.n_vocab), minus_infinity);
    for (size_t i = 0; i < n_kept; ++i) {
        scratch.row[static_cast<size_t>(list.known[i].id)] = list.known[i].logit;
    }
    const std::vector<Ranked> best = rank_as_engine(s, scratch.row.data(), pos, 2, scratch);
    const double lead = best.size() < 2 ? std::numeric_limits<double>::infinity() : best[0].score - best[1].score;
    return {best[0].token, SLLM_DECIDED, lead};
}

Selector::Certified Selector::select_known(const int32_t * tokens, const float * logprobs, int32_t n, int32_t pos,
                                           Scratch & scratch) const {
    const sllm_sampling & s = *sampling;
    scratch.all_allowed = false;
    Shortlist list = shortlist(tokens, logprobs, n, scratch);
    if (s.noise != SLLM_NOISE_SLLM && s.temperature > 0) {
        return known_as_engine(list, pos, scratch);
    }
    std::vector<llama_token_data> & known = list.known;
    const size_t ranked = n_ranked(list);
    const size_t k = s.top_k > 0 ? static_cast<size_t>(s.top_k) : SIZE_MAX;

    // 1. The candidates of the whole row are known: the selection is that of the whole row.
    const size_t needed = s.temperature == 0 ? 1 : k;
    const bool all = ranked < needed && !another_may_follow(list, scratch);
    if (ranked >= needed || all) {
        known.resize(std::min(known.size(), needed));
        scratch.candidates = known;
        tame(scratch.candidates);
        scratch.filtered = {scratch.candidates.data(), scratch.candidates.size(), -1, true};
        if (filters != nullptr && s.temperature > 0 && !known.empty()) {
            llama_sampler_apply(filters.get(), &scratch.filtered);
        }
        return {choose(scratch.filtered, pos, false).token, SLLM_DECIDED};
    }
    if (s.temperature == 0 || known.empty()) {
        return {-1, SLLM_UNDECIDED};
    }

    // 2. Which of the known tokens survive the filters, whatever the others are.
    const float top = known.front().logit;
    float upper = list.has_others ? list.bound : minus_infinity; // of any other token
    double added = 0;                                            // mass that changes may have given to others
    double taken = 0;                                            // and taken from them
    const auto weight = [&](float logit) { return std::exp(static_cast<double>(logit) - static_cast<double>(top)); };
    for (const Changed & c : list.changed) {
        upper = std::max(upper, c.upper);
        added += weight(c.upper);
        taken += weight(list.bound);
    }
    taken += weight(list.bound) * static_cast<double>(list.excluded.size());
    const double unit = std::exp(-static_cast<double>(top)); // of the mass in these weights
    const double most_rest = list.has_others ? (list.rest + mass_slack) * unit + added : 0;
    const bool any_may_go = s.grammar != nullptr || k != SIZE_MAX;
    const double least_rest = !list.has_others || any_may_go ? 0 : std::max(0.0, (list.rest - mass_slack) * unit - taken);
    double sum = 0;
    for (size_t i = 0; i < std::min(k, known.size()); ++i) {
        sum += weight(known[i].logit);
    }
    const double least = sum + least_rest;
    const double most = sum + most_rest;
    const double p = static_cast<double>(s.top_p);
    // A token is in the nucleus if those before it have less than p together: `least_before` to `most_before`.
    const auto in_nucleus = [&](double least_before, double most_before) {
        return most_before / least < p - border_slack   ? Survives::yes
               : least_before / most > p + border_slack ? Survives::no
                                                        : Survives::perhaps;
    };
    const float log_min_p = s.min_p > 0 ? std::log(s.min_p) : minus_infinity;
    std::vector<Survives> survives(known.size(), Survives::yes);
    double before = 0; // the weight of all that are likelier
    for (size_t i = 0; i < known.size();) {
        size_t end = i; // equal ones may come in any order
        double equal = 0;
        while (end < known.size() && known[end].logit == known[i].logit) {
            equal += weight(known[end++].logit);
        }
        for (; i < end; ++i) {
            const bool sure = i < ranked;
            Survives & state = survives[i];
            if (i >= k || (s.min_p > 0 && known[i].logit < top + log_min_p)) {
                state = Survives::no;
                continue;
            }
            if (!sure && (k != SIZE_MAX || (s.min_p > 0 && known[i].logit < upper + log_min_p))) {
                state = Survives::perhaps;
            }
            if (s.top_p < 1.0F && !(sure && i == 0)) {
                const double own = weight(known[i].logit);
                state = both(state, in_nucleus(before, before + equal - own + (sure ? 0 : most_rest)));
            }
        }
        before += equal;
    }
    // And whether others may: with the largest logit that any can have.
    bool others_may = list.has_others && ranked < k && !(s.min_p > 0 && upper < top + log_min_p);
    if (others_may && s.top_p < 1.0F) {
        double likelier = 0;
        for (const llama_token_data & c : known) {
            likelier += c.logit > upper ? weight(c.logit) : 0;
        }
        others_may = in_nucleus(likelier, likelier + most_rest) != Survives::no;
    }

    // 3. The best of those that survive is the token, if nothing that may survive besides can be better.
    const llama_token_data * best = nullptr;
    double best_score = 0;
    for (size_t i = 0; i < known.size(); ++i) {
        const double own = score(known[i].logit, pos, known[i].id);
        if (survives[i] == Survives::yes && (best == nullptr || own > best_score || (own == best_score && known[i].id < best->id))) {
            best = &known[i];
            best_score = own;
        }
    }
    if (best == nullptr) {
        return {-1, SLLM_UNDECIDED};
    }
    bool certain = !others_may;
    for (size_t i = 0; i < known.size(); ++i) {
        if (survives[i] == Survives::perhaps) {
            certain = false;
            if (score(known[i].logit, pos, known[i].id) >= best_score) {
                return {-1, SLLM_UNDECIDED};
            }
        }
    }
    if (others_may && another_reaches(best_score, pos, list, scratch)) {
        return {-1, SLLM_UNDECIDED};
    }
    return {best->id, certain ? SLLM_DECIDED : SLLM_CERTIFIED};
}

} // namespace sllm

extern "C" {

int sllm_select_known(const sllm_sampling * sampling, const int32_t * tokens, const float * logprobs, int32_t n, int32_t pos,
                      const int32_t * history, int32_t start, int32_t * token, int32_t * how, double * lead) {
    return sllm::guarded([&] {
        *token = -1;
        *how = SLLM_UNDECIDED;
        if (n < 1 || n > sampling->model.n_vocab) {
            sllm::fail(SLLM_ERR_INVALID, "%d likeliest tokens of a vocabulary of %d", n, sampling->model.n_vocab);
        }
        if (sampling->has_penalties() && sampling->penalty_repeat != 1.0F) {
            sllm::fail(SLLM_ERR_UNSUPPORTED, "penalty_repeat divides logits, which log-probabilities do not tell; use penalty_freq or "
                                             "penalty_present");
        }
        sllm::Selector selector;
        selector.begin(*sampling, sllm::checked_history(*sampling, history, pos), start);
        sllm::Scratch scratch;
        const sllm::Selector::Certified found = selector.select_known(tokens, logprobs, n, pos, scratch);
        *token = found.token;
        *how = found.how;
        if (lead != nullptr) {
            *lead = found.lead;
        }
    });
}

} // extern "C"
