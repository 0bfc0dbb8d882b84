// Batched draft and verify: whole loops over the model and the selection, several sequences at once.
//
// Verification accepts a drafted token exactly when it is the token that the target itself selects at that position (Leviathan et
// al. 2211.17192 and Chen et al. 2302.01318 accept by a ratio of probabilities; with selection a function of position and logits,
// equality is lossless and needs none).

#include "internal.hpp"

#include <algorithm>

namespace {

// What draft and verify take for each sequence, checked.
struct Job {
    llama_seq_id seq_id;
    const int32_t * tokens;
    size_t n_tokens;
    size_t pos;
    const sllm_sampling * sampling;
    int32_t start;
};

std::vector<Job> check_jobs(sllm_context & context, int32_t n_seqs, const int32_t * seq_ids, const int32_t * tokens,
                            const int32_t * lengths, const int32_t * pos, sllm_sampling * const * samplings, const int32_t * start) {
    sllm::check_sequences(context, n_seqs, seq_ids);
    std::vector<Job> jobs;
    const int32_t * text = tokens;
    for (int32_t i = 0; i < n_seqs; ++i) {
        if (lengths[i] < 1) {
            sllm::fail(SLLM_ERR_INVALID, "sequence %d is given no token to go on from", seq_ids[i]);
        }
        if (samplings[i]->model.vocab != context.model.vocab) {
            sllm::fail(SLLM_ERR_INVALID, "the sampling of sequence %d was made for another model", seq_ids[i]);
        }
        const auto n = static_cast<size_t>(lengths[i]);
        const size_t at = sllm::checked_position(context, seq_ids[i], pos == nullptr ? -1 : pos[i], n);
        sllm::check_tokens(context, text, n);
        jobs.push_back({seq_ids[i], text, n, at, samplings[i], start == nullptr ? -1 : start[i]});
        text += n;
    }
    return jobs;
}

// Where generated text begins: as told, as remembered, or here.
int32_t resolve_start(sllm::Sequence & s, const Job & job) {
    const auto here = static_cast<int32_t>(job.pos + job.n_tokens);
    if (job.start >= 0) {
        s.start = std::min(job.start, here);
    } else if (s.start < 0 || s.start > here) {
        s.start = here;
    }
    return s.start;
}

// The selector of a sequence, ready behind the committed tokens and the job's.
void begin_selection(sllm::Sequence & s, const Job & job) {
    const size_t n_history = job.pos + job.n_tokens;
    const std::vector<llama_token> history(s.tokens.begin(), s.tokens.begin() + static_cast<std::ptrdiff_t>(n_history));
    s.selector.begin(*job.sampling, history, resolve_start(s, job));
}

bool needs_history(const sllm_sampling & sampling) { return sampling.grammar != nullptr || sampling.has_penalties(); }

} // namespace

extern "C" {

int sllm_draft(sllm_context * context, int32_t n_seqs, const int32_t * seq_ids, const int32_t * tokens, const int32_t * lengths,
               const int32_t * pos, sllm_sampling * const * samplings, const int32_t * start, const int32_t * n_max, const float * p_min,
               int32_t stride, int32_t * draft, int32_t * drafted, float * probs) {
    return sllm::guarded([&] {
        const sllm::Entry entry(*context);
        const std::vector<Job> jobs = check_jobs(*context, n_seqs, seq_ids, tokens, lengths, pos, samplings, start);
        for (int32_t i = 0; i < n_seqs; ++i) {
            if (n_max[i] < 0 || n_max[i] > stride) {
                sllm::fail(SLLM_ERR_INVALID, "n_max is %d, not in 0..%d", n_max[i], stride);
            }
            if (!(p_min[i] >= 0 && p_min[i] <= 1)) {
                sllm::fail(SLLM_ERR_INVALID, "p_min is %g, not in [0, 1]", static_cast<double>(p_min[i]));
            }
        }
        const auto width = static_cast<size_t>(stride);
        std::fill_n(draft, width * jobs.size(), -1);
        std::fill_n(probs, width * jobs.size(), 0.0F);
        std::fill_n(drafted, jobs.size(), 0);

        std::vector<sllm::Write> writes;
        std::vector<size_t> active; // the jobs behind the rows of the next pass
        for (size_t i = 0; i < jobs.size(); ++i) {
            const Job & job = jobs[i];
            const size_t n_logits = n_max[i] > 0 ? 1 : 0;
            const size_t begin = sllm::place_tokens(*context, job.seq_id, job.pos, job.tokens, job.n_tokens, n_logits);
            const size_t end = job.pos + job.n_tokens;
            writes.push_back({job.seq_id, begin, end, end - n_logits});
            if (n_max[i] > 0) {
                active.push_back(i);
            }
        }
        sllm::compute(*context, writes, nullptr);
        std::vector<sllm::Selector> ahead(jobs.size()); // drafted text must not reach the selectors of the committed text
        for (const size_t i : active) {
            sllm::Sequence & s = sllm::sequence_at(*context, jobs[i].seq_id);
            if (needs_history(*jobs[i].sampling)) {
                begin_selection(s, jobs[i]);
                ahead[i] = s.selector.clone();
            } else {
                s.selector.begin(*jobs[i].sampling, {}, -1);
            }
        }
        for (const Job & job : jobs) {
            sllm::sequence_at(*context, job.seq_id).n_committed = job.pos + job.n_tokens;
        }

        while (!active.empty()) {
            const float * row = llama_get_logits(context->context.get());
            std::vector<size_t> still;
            writes.clear();
            for (const size_t i : active) {
                const Job & job = jobs[i];
                sllm::Sequence & s = sllm::sequence_at(*context, job.seq_id);
                sllm::Selector & selector = needs_history(*job.sampling) ? ahead[i] : s.selector;
                const auto n = static_cast<size_t>(drafted[i]);
                const size_t at = job.pos + job.n_tokens + n; // the position being selected
                const sllm::Choice choice = selector.select(row, static_cast<int32_t>(at), true);
                row += context->info.n_vocab;
                if (choice.prob < p_min[i]) {
                    continue;
                }
                draft[i * width + n] = choice.token;
                probs[i * width + n] = choice.prob;
                ++drafted[i];
                const bool ends = llama_vocab_is_eog(context->model.vocab, choice.token);
                if (ends || drafted[i] == n_max[i] || at >= context->info.n_ctx_seq) {
                    continue;
                }
                selector.accept(choice.token);
                s.tokens.push_back(choice.token);
                writes.push_back({job.seq_id, at, at + 1, at});
                still.push_back(i);
            }
            active.swap(still);
            if (active.empty()) {
                break;
            }
            try {
                sllm::compute(*context, writes, nullptr);
            } catch (const sllm::Error & error) {
                for (const size_t i : active) {
                    sllm::uncache(*context, jobs[i].seq_id, sllm::sequence_at(*context, jobs[i].seq_id).n_cached);
                }
                if (error.status == SLLM_ERR_CANCELLED || error.status == SLLM_ERR_FULL) {
                    break; // a draft is only a hint: a shorter one will do
                }
                throw;
            }
        }
    });
}

int sllm_verify(sllm_context * context, int32_t n_seqs, const int32_t * seq_ids, const int32_t * tokens, const int32_t * lengths,
                const int32_t * pos, sllm_sampling * const * samplings, const int32_t * start, const int32_t * draft,
                const int32_t * n_drafted, int32_t stride, int32_t * selected, int32_t * n_accepted, float * logprobs) {
    return sllm::guarded([&] {
        const sllm::Entry entry(*context);
        const std::vector<Job> jobs = check_jobs(*context, n_seqs, seq_ids, tokens, lengths, pos, samplings, start);
        const auto width = static_cast<size_t>(stride);
        std::vector<std::vector<int32_t>> chains(jobs.size()); // the job's tokens and the drafted ones that can be verified
        size_t n_rows = 0;
        for (size_t i = 0; i < jobs.size(); ++i) {
            if (n_drafted[i] < 0 || n_drafted[i] > stride) {
                sllm::fail(SLLM_ERR_INVALID, "a draft has %d tokens, not 0..%d", n_drafted[i], stride);
            }
            chains[i].assign(jobs[i].tokens, jobs[i].tokens + jobs[i].n_tokens);
            const size_t room = context->info.n_ctx_seq - (jobs[i].pos + jobs[i].n_tokens);
            const size_t usable = context->model.can_rollback ? std::min(static_cast<size_t>(n_drafted[i]), room) : 0;
            for (size_t j = 0; j < usable; ++j) {
                const int32_t token = draft[i * width + j];
                if (token < 0 || token >= context->info.n_vocab) {
                    break;
                }
                chains[i].push_back(token);
            }
            n_rows += 1 + chains[i].size() - jobs[i].n_tokens;
        }
        if (n_rows > context->info.n_outputs_max) {
            sllm::fail(
                SLLM_ERR_INVALID,
                "%zu rows of logits are needed to verify these drafts, and the context keeps %u: shorten them or raise n_outputs_max",
                n_rows, context->info.n_outputs_max);
        }

        std::vector<sllm::Write> writes;
        for (size_t i = 0; i < jobs.size(); ++i) {
            const Job & job = jobs[i];
            const size_t n_logits = 1 + chains[i].size() - job.n_tokens;
            const size_t begin = sllm::place_tokens(*context, job.seq_id, job.pos, chains[i].data(), chains[i].size(), n_logits);
            const size_t end = job.pos + chains[i].size();
            writes.push_back({job.seq_id, begin, end, end - n_logits});
        }
        const auto give_up = [&] { // back to where the caller's tokens began
            for (const Job & job : jobs) {
                sllm::uncache(*context, job.seq_id, sllm::sequence_at(*context, job.seq_id).n_committed);
            }
        };
        try {
            sllm::compute(*context, writes, nullptr);
            for (const Job & job : jobs) {
                sllm::Sequence & s = sllm::sequence_at(*context, job.seq_id);
                if (needs_history(*job.sampling)) {
                    begin_selection(s, job);
                } else {
                    s.selector.begin(*job.sampling, {}, -1);
                }
            }
            std::fill_n(selected, (width + 1) * jobs.size(), -1);
            if (logprobs != nullptr) {
                std::fill_n(logprobs, (width + 1) * jobs.size(), 0.0F);
            }
            const float * row = llama_get_logits(context->context.get());
            for (size_t i = 0; i < jobs.size(); ++i) {
                const Job & job = jobs[i];
                sllm::Selector & selector = sllm::sequence_at(*context, job.seq_id).selector;
                const size_t k = chains[i].size() - job.n_tokens;
                size_t accepted = 0;
                for (size_t j = 0; j <= k; ++j) {
                    const float * logits = row + j * static_cast<size_t>(context->info.n_vocab);
                    const size_t at = job.pos + job.n_tokens + j;
                    const llama_token token = selector.select(logits, static_cast<int32_t>(at), false).token;
                    selected[i * (width + 1) + j] = token;
                    if (logprobs != nullptr) {
                        logprobs[i * (width + 1) + j] = static_cast<float>(sllm::log_prob(logits, context->info.n_vocab, token));
                    }
                    accepted = j;
                    if (j == k || token != chains[i][job.n_tokens + j] || llama_vocab_is_eog(context->model.vocab, token)) {
                        break;
                    }
                    selector.accept(token);
                }
                n_accepted[i] = static_cast<int32_t>(accepted);
                row += (k + 1) * static_cast<size_t>(context->info.n_vocab);
            }
        } catch (...) {
            give_up();
            throw;
        }
        for (size_t i = 0; i < jobs.size(); ++i) {
            sllm::Sequence & s = sllm::sequence_at(*context, jobs[i].seq_id);
            s.n_committed = jobs[i].pos + jobs[i].n_tokens + static_cast<size_t>(n_accepted[i]);
            sllm::uncache(*context, jobs[i].seq_id, s.n_committed);
        }
    });
}

} // extern "C"
