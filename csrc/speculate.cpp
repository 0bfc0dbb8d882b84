// Batched draft and verify: whole loops over the model and the selection, several sequences at once.
//
// Verification accepts a drafted token exactly when it is the token that the target itself selects at that position (Leviathan et
// al. 2211.17192 and Chen et al. 2302.01318 accept by a ratio of probabilities; with selection a function of position and logits,
// equality is lossless and needs none).

#include "internal.hpp"
#include "tree.hpp"

#include <algorithm>
#include <numeric>

namespace sllm {

std::vector<Job> read_jobs(sllm_context & context, int32_t n_seqs, const int32_t * items, int32_t n_items,
                           sllm_sampling * const * samplings, int32_t stride, bool with_draft) {
    std::vector<Job> jobs;
    std::vector<int32_t> seq_ids;
    const auto n_jobs = static_cast<size_t>(std::max(n_seqs, 0));
    jobs.reserve(n_jobs);
    seq_ids.reserve(n_jobs);
    const int32_t * const end = items + std::max(n_items, 0);
    for (size_t i = 0; i < n_jobs; ++i) {
        if (end - items < SLLM_JOB_HEADER) {
            sllm::fail(SLLM_ERR_INVALID, "the jobs end before sequence %zu of %zu", i, n_jobs);
        }
        const int32_t seq_id = items[0];
        const int32_t pos = items[1];
        const int32_t start = items[2];
        const int32_t n_tokens = items[3];
        const int32_t n_more = items[4];
        items += SLLM_JOB_HEADER;
        if (n_tokens < 1) {
            sllm::fail(SLLM_ERR_INVALID, "sequence %d is given no token to go on from", seq_id);
        }
        if (n_more < 0 || n_more > stride) {
            sllm::fail(SLLM_ERR_INVALID, "%s is %d, not in 0..%d", with_draft ? "the length of a draft" : "n_max", n_more, stride);
        }
        if (end - items < int64_t{n_tokens} + (with_draft ? n_more : 0)) {
            sllm::fail(SLLM_ERR_INVALID, "the jobs end inside sequence %zu of %zu", i, n_jobs);
        }
        if (samplings[i]->model.vocab != context.model.vocab) {
            sllm::fail(SLLM_ERR_INVALID, "the sampling of sequence %d was made for another model", seq_id);
        }
        jobs.push_back({seq_id, items, static_cast<size_t>(n_tokens), static_cast<size_t>(n_more), 0, start, samplings[i]});
        seq_ids.push_back(seq_id);
        jobs.back().pos = sllm::checked_position(context, seq_id, pos, jobs.back().n_tokens);
        sllm::check_tokens(context, items, jobs.back().n_tokens);
        items += n_tokens + (with_draft ? n_more : 0);
    }
    sllm::check_sequences(context, n_seqs, seq_ids.data());
    return jobs;
}

void begin_selection(Selector & selector, const Sequence & s, const Job & job, int32_t start) {
    std::vector<llama_token> history(s.tokens.begin(), s.tokens.begin() + static_cast<std::ptrdiff_t>(job.pos));
    history.insert(history.end(), job.tokens, job.tokens + job.n_tokens);
    selector.begin(*job.sampling, history, start);
}

bool needs_history(const sllm_sampling & sampling) { return sampling.grammar != nullptr || sampling.has_penalties(); }

void Chains::begin(size_t n) const {
    for (size_t i = 0; i < n; ++i) {
        if (!(p_min[i] >= 0 && p_min[i] <= 1)) {
            fail(SLLM_ERR_INVALID, "p_min is %g, not in [0, 1]", static_cast<double>(p_min[i]));
        }
    }
    std::fill_n(tokens, width * n, -1);
    std::fill_n(probs, width * n, 0.0F);
    std::fill_n(lengths, n, 0);
}

bool Chains::extend(size_t i, sllm_context & context, const Job & job, Selector & selector, const float * logits) const {
    const auto n = static_cast<size_t>(lengths[i]);
    const size_t at = job.pos + job.n_tokens + n; // the position being selected
    Choice choice{};
    try {
        if (n > 0) {
            selector.accept(last(i));
        }
        choice = selector.select(logits, static_cast<int32_t>(at), true, context.selection);
    } catch (const std::exception &) {
        if (status_of_current_exception() == SLLM_ERR_INTERRUPTED) {
            throw;
        }
        selector = Selector{}; // it may have stopped half way
        return false;          // a shorter draft will do; what is wrong is the target's to say
    }
    if (choice.prob < p_min[i]) {
        return false;
    }
    tokens[i * width + n] = choice.token;
    probs[i * width + n] = choice.prob;
    ++lengths[i];
    const bool ends = context.model.ends(choice.token);
    return !ends && n + 1 < job.n_more && at < context.info.n_ctx_seq;
}

int32_t resolve_start(Sequence & s, const Job & job) {
    const auto here = static_cast<int32_t>(job.pos + job.n_tokens);
    if (job.start >= 0) {
        s.start = std::min(job.start, here);
    } else if (s.start < 0 || s.start > here) {
        s.start = here;
    }
    return s.start;
}

} // namespace sllm

namespace {

// How many committed tokens may be computed again together with drafted ones, rather than by a pass of their own with a checkpoint
// after it: a pass costs about as much as these rows do.
constexpr size_t N_AGAIN = 16;
// A target goes back to where its last draft began.
constexpr size_t N_VERIFY_CHECKPOINTS = 2;
// Drafting token by token, call by call, needs no checkpoint for each.
constexpr size_t N_DRAFT_STEP = 4;

// How many drafted tokens of a sequence can be verified and taken back again.
size_t n_verifiable(const sllm_context & context, size_t n_more) {
    switch (context.rollback) {
    case sllm::Rollback::any: return n_more;
    case sllm::Rollback::snapshots: return std::min<size_t>(n_more, context.info.n_rollback);
    case sllm::Rollback::checkpoints: break;
    }
    return context.model.is_layers ? 0 : n_more; // layers could not compute again what a checkpoint leaves out
}

// Without snapshots: see to it that every sequence with drafted tokens has a checkpoint not far before them.
void make_checkpoints(sllm_context & context, const std::vector<sllm::Job> & jobs, std::vector<sllm::Write> & writes) {
    std::vector<sllm::Write> first;
    for (size_t i = 0; i < jobs.size(); ++i) {
        sllm::Write & w = writes[i];
        if (jobs[i].n_more > 0 && w.first_output > w.begin + N_AGAIN) {
            first.push_back({w.seq_id, w.begin, w.first_output, w.first_output});
            w.begin = w.first_output;
        }
    }
    if (!first.empty()) {
        sllm::compute(context, first, nullptr);
    }
    for (size_t i = 0; i < jobs.size(); ++i) {
        if (jobs[i].n_more > 0) {
            sllm::save_checkpoint(context, jobs[i].seq_id, N_VERIFY_CHECKPOINTS);
        }
    }
}

// With snapshots: compute by themselves the committed tokens that go before the last one, so that what is left of each sequence
// are as many rows as can be taken back; and give all sequences as many of these, since recurrent layers take equally many rows of
// every sequence in one graph, and ragged drafts would need a graph for each length. What is added is taken back with the rejected
// tokens.
void level(sllm_context & context, const std::vector<sllm::Job> & jobs, std::vector<sllm::Write> & writes) {
    std::vector<sllm::Write> first;
    size_t most = 0;
    size_t n_cached = 0;
    for (size_t i = 0; i < jobs.size(); ++i) {
        sllm::Write & w = writes[i];
        if (w.first_output > w.begin) {
            first.push_back({w.seq_id, w.begin, w.first_output, w.first_output, w.hidden});
            w.hidden = w.hidden == nullptr ? nullptr : w.hidden + (w.first_output - w.begin) * sllm::n_embd(context);
            w.begin = w.first_output;
        }
        most = std::max(most, jobs[i].n_more);
    }
    if (!first.empty()) {
        sllm::compute(context, first, nullptr);
    }
    for (const sllm::Sequence & s : context.sequences) {
        n_cached += s.n_cached;
    }
    if (jobs.size() < 2 || context.model.is_layers || (context.kv_unified && n_cached + jobs.size() * (1 + most) > context.info.n_ctx)) {
        return;
    }
    for (size_t i = 0; i < jobs.size(); ++i) {
        sllm::Write & w = writes[i];
        const size_t missing = most - jobs[i].n_more;
        if (w.end + missing <= context.info.n_ctx_seq) {
            sllm::sequence_at(context, w.seq_id).tokens.resize(w.end + missing, 0);
            w.end += missing;
            w.n_padding = missing;
        }
    }
}

// Which jobs to compute together: all of them, except with snapshots. There it is those that llama.cpp computes as one graph: a second
// graph may move the states of the sequences of the first one, and their snapshots do not move along.
std::vector<std::vector<size_t>> grouped(const sllm_context & context, const std::vector<sllm::Write> & writes) {
    std::vector<size_t> order(writes.size());
    std::iota(order.begin(), order.end(), size_t{0});
    if (context.rollback != sllm::Rollback::snapshots) {
        return {order};
    }
    std::sort(order.begin(), order.end(), [&](size_t a, size_t b) { return writes[a].seq_id < writes[b].seq_id; });
    std::vector<std::vector<size_t>> groups;
    for (const size_t i : order) {
        if (!groups.empty()) {
            std::vector<size_t> & last = groups.back();
            const sllm::Write & before = writes[last.back()];
            const size_t n_rows = writes[i].end - writes[i].begin;
            if (!context.model.is_layers && before.end - before.begin == n_rows &&
                (context.kv_unified || before.seq_id + 1 == writes[i].seq_id) && (last.size() + 1) * n_rows <= context.info.n_ubatch) {
                last.push_back(i);
                continue;
            }
        }
        groups.push_back({i});
    }
    return groups;
}

// Where the verdict on one sequence goes, as sllm.h describes it.
struct Verdict {
    int32_t * selected;
    int32_t * n_accepted;
    float * logprobs; // or null
};

// Which row of logits comes after row `at` where `token` was selected: row 0 is the last committed token's, row i + 1 that of drafted
// token or node i. 0: none was drafted there.
size_t next_row(const sllm::Job & job, size_t at, llama_token token) {
    if (job.tree.empty()) {
        return at < job.n_more && job.tokens[job.n_tokens + at] == token ? at + 1 : 0;
    }
    for (size_t i = at; i < job.tree.size(); ++i) {
        if (job.tree[i].parent == static_cast<int32_t>(at) - 1 && job.tree[i].token == token) {
            return i + 1;
        }
    }
    return 0;
}

// Select after the committed tokens and after each drafted one that agrees, from a row of logits for each. Returns the row of the
// last of them.
size_t judge(sllm_context & context, const sllm::Job & job, const float * rows, const Verdict & verdict) {
    sllm::Sequence & s = sllm::sequence_at(context, job.seq_id);
    if (sllm::needs_history(*job.sampling)) {
        sllm::begin_selection(s.selector, s, job, sllm::resolve_start(s, job));
    } else {
        s.selector.begin(*job.sampling, {}, -1);
    }
    size_t row = 0;
    size_t accepted = 0;
    for (size_t next = 0;; ++accepted) {
        const float * logits = rows + next * static_cast<size_t>(context.info.n_vocab);
        llama_token token = -1;
        try {
            if (accepted > 0) {
                s.selector.accept(verdict.selected[accepted - 1]);
            }
            token = s.selector.select(logits, static_cast<int32_t>(job.pos + job.n_tokens + accepted), false, context.selection).token;
        } catch (const std::exception &) {
            s.selector = sllm::Selector{}; // it may have stopped half way
            if (accepted == 0 || sllm::status_of_current_exception() == SLLM_ERR_INTERRUPTED) {
                throw;
            }
            --accepted;
            break; // without a draft the tokens before this one would have come: the next call will raise
        }
        row = next;
        verdict.selected[accepted] = token;
        if (verdict.logprobs != nullptr) {
            verdict.logprobs[accepted] = static_cast<float>(sllm::log_prob(logits, context.info.n_vocab, token));
        }
        next = next_row(job, row, token);
        if (next == 0 || context.model.ends(token)) {
            break;
        }
    }
    *verdict.n_accepted = static_cast<int32_t>(accepted);
    return row;
}

// Memory and text of a sequence whose tree was judged: of the nodes those on the main path stay, as far as they were accepted.
void commit_tree(sllm_context & context, const sllm::Job & job, size_t row, const int32_t * selected, size_t accepted) {
    sllm::Sequence & s = sllm::sequence_at(context, job.seq_id);
    s.tokens.resize(job.pos + job.n_tokens);
    s.tokens.insert(s.tokens.end(), selected, selected + accepted);
    const auto n_main = static_cast<int32_t>(sllm::main_path(job.tree));
    int32_t last = static_cast<int32_t>(row) - 1;
    while (last >= n_main) {
        last = job.tree[static_cast<size_t>(last)].parent;
    }
    sllm::keep_path(context, job.seq_id, last);
}

bool is_chain(const int32_t * parents, size_t n) {
    for (size_t i = 0; i < n; ++i) {
        if (parents[i] != static_cast<int32_t>(i) - 1) {
            return false;
        }
    }
    return true;
}

// Makes a job's drafted tokens, with their parents, a tree or a chain of what can be verified. Nodes outside the vocabulary go, with all
// that follows them, and those for which the sequence has no room, each node taking that of a token: the main path goes first.
void plant(const sllm_context & context, sllm::Job & job, const int32_t * parents, size_t room) {
    const int32_t * const tokens = job.tokens + job.n_tokens;
    const std::vector<sllm::Node> all = sllm::read_tree(tokens, parents, job.n_more, job.rows);
    const bool branches = sllm::can_branch(context);
    std::vector<int32_t> kept;
    std::vector<sllm::Node> tree = sllm::prune(all, room, kept, [&](size_t i, const sllm::Node & node) {
        const bool is_main = node.parent == static_cast<int32_t>(i) - 1 && kept.size() == i;
        if (node.token < 0 || node.token >= context.info.n_vocab || !(branches || is_main)) {
            return false;
        }
        if (branches && kept.size() == sllm::N_TREE_NODES) {
            sllm::fail(SLLM_ERR_INVALID, "the tree of sequence %d has more than %zu nodes", job.seq_id, sllm::N_TREE_NODES);
        }
        return true;
    });
    std::vector<int32_t> rows;
    for (const int32_t place : kept) {
        rows.push_back(job.rows[static_cast<size_t>(place)]);
    }
    job.rows = std::move(rows);
    job.n_more = tree.size();
    if (sllm::main_path(tree) == tree.size()) { // what is left is a chain
        job.chain.assign(job.tokens, job.tokens + job.n_tokens);
        for (const sllm::Node & node : tree) {
            job.chain.push_back(node.token);
        }
        job.tokens = job.chain.data();
    } else {
        job.tree = std::move(tree);
    }
}

} // namespace

extern "C" {

int sllm_draft(sllm_context * context, int32_t n_seqs, const int32_t * items, int32_t n_items, sllm_sampling * const * samplings,
               const float * p_min, int32_t stride, int32_t * draft, int32_t * drafted, float * probs) {
    return sllm::guarded([&] {
        const sllm::Entry entry(*context);
        sllm::check_hidden(*context, nullptr, 0);
        const std::vector<sllm::Job> jobs = sllm::read_jobs(*context, n_seqs, items, n_items, samplings, stride, false);
        const sllm::Chains chains{p_min, static_cast<size_t>(stride), draft, drafted, probs};
        chains.begin(jobs.size());

        std::vector<sllm::Write> writes;
        std::vector<size_t> active; // the jobs behind the rows of the next pass
        for (size_t i = 0; i < jobs.size(); ++i) {
            const sllm::Job & job = jobs[i];
            const size_t n_logits = job.n_more > 0 ? 1 : 0;
            const size_t begin = sllm::place_tokens(*context, job.seq_id, job.pos, job.tokens, job.n_tokens, n_logits);
            const size_t end = job.pos + job.n_tokens;
            writes.push_back({job.seq_id, begin, end, end - n_logits});
            if (job.n_more > 0) {
                active.push_back(i);
            }
        }
        sllm::compute(*context, writes, nullptr);
        std::vector<sllm::Selector> ahead(jobs.size()); // drafted text must not reach the selectors of the committed text
        for (const size_t i : active) {
            sllm::Sequence & s = sllm::sequence_at(*context, jobs[i].seq_id);
            if (sllm::needs_history(*jobs[i].sampling)) {
                sllm::begin_selection(s.selector, s, jobs[i], sllm::resolve_start(s, jobs[i]));
                ahead[i] = s.selector.clone();
            } else {
                s.selector.begin(*jobs[i].sampling, {}, -1);
            }
        }
        for (const sllm::Job & job : jobs) {
            sllm::sequence_at(*context, job.seq_id).n_committed = job.pos + job.n_tokens;
        }

        for (const size_t i : active) {
            // What is drafted is decoded one by one, and so may be what the caller passes in: no snapshots go back over that.
            const sllm::Sequence & s = sllm::sequence_at(*context, jobs[i].seq_id);
            if (jobs[i].n_more > 1 || s.checkpoints.empty() || s.checkpoints.back().pos + N_DRAFT_STEP <= s.n_cached) {
                sllm::save_checkpoint(*context, jobs[i].seq_id, sllm::N_DRAFT_CHECKPOINTS);
            }
        }
        while (!active.empty()) {
            const float * row = llama_get_logits(context->context.get());
            std::vector<size_t> still;
            writes.clear();
            for (const size_t i : active) {
                const sllm::Job & job = jobs[i];
                sllm::Sequence & s = sllm::sequence_at(*context, job.seq_id);
                sllm::Selector & selector = sllm::needs_history(*job.sampling) ? ahead[i] : s.selector;
                const float * logits = row;
                row += context->info.n_vocab;
                if (!chains.extend(i, *context, job, selector, logits)) {
                    continue;
                }
                const size_t at = s.tokens.size();
                s.tokens.push_back(chains.last(i));
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

int sllm_verify(sllm_context * context, int32_t n_seqs, const int32_t * items, int32_t n_items, sllm_sampling * const * samplings,
                int32_t stride, const int32_t * parents, const float * hidden, int32_t * selected, int32_t * n_accepted, float * logprobs) {
    return sllm::guarded([&] {
        const sllm::Entry entry(*context);
        sllm::check_has_output(*context);
        std::vector<sllm::Job> jobs = sllm::read_jobs(*context, n_seqs, items, n_items, samplings, stride, true);
        const auto width = static_cast<size_t>(stride) + 1;
        const size_t n_columns = hidden == nullptr ? 0 : sllm::n_embd(*context);
        size_t n_hidden = 0;
        std::vector<const float *> inputs; // of layers: the first row for each job
        inputs.reserve(jobs.size());
        for (const sllm::Job & job : jobs) {
            inputs.push_back(hidden == nullptr ? nullptr : hidden + n_hidden * n_columns);
            n_hidden += job.n_tokens + job.n_more;
        }
        sllm::check_hidden(*context, hidden, n_hidden);
        size_t n_rows = 0;
        std::vector<std::vector<float>> sorted(jobs.size()); // of layers: the rows of trees, in the order of their nodes
        for (size_t i = 0; i < jobs.size(); ++i) {           // from here on `n_more` are the drafted tokens that can be verified
            sllm::Job & job = jobs[i];
            const size_t room = context->info.n_ctx_seq - (job.pos + job.n_tokens);
            const size_t n_given = job.n_more;
            if (parents != nullptr && !is_chain(parents, n_given)) {
                plant(*context, job, parents, room);
                if (hidden != nullptr) {
                    sorted[i].assign(inputs[i], inputs[i] + job.n_tokens * n_columns);
                    for (const int32_t row : job.rows) {
                        const float * const from = inputs[i] + (job.n_tokens + static_cast<size_t>(row)) * n_columns;
                        sorted[i].insert(sorted[i].end(), from, from + n_columns);
                    }
                    inputs[i] = sorted[i].data();
                }
            }
            parents = parents == nullptr ? nullptr : parents + n_given;
            if (job.tree.empty()) {
                const size_t limit = std::min(n_verifiable(*context, job.n_more), room);
                const int32_t * const hints = job.tokens + job.n_tokens;
                const auto is_token = [&](int32_t token) { return token >= 0 && token < context->info.n_vocab; };
                job.n_more = static_cast<size_t>(std::find_if_not(hints, hints + limit, is_token) - hints);
            }
            n_rows += 1 + job.n_more;
        }
        if (n_rows > context->info.n_outputs_max) {
            sllm::fail(
                SLLM_ERR_INVALID,
                "%zu rows of logits are needed to verify these drafts, and the context keeps %u: shorten them or raise n_outputs_max",
                n_rows, context->info.n_outputs_max);
        }

        std::vector<sllm::Write> writes;
        writes.reserve(jobs.size());
        for (size_t i = 0; i < jobs.size(); ++i) {
            const sllm::Job & job = jobs[i];
            const size_t n_chain = job.tree.empty() ? job.n_more : 0;
            const size_t n_written = job.n_tokens + n_chain;
            const size_t n_recompute = hidden == nullptr ? 1 + n_chain : n_written;
            const size_t begin = sllm::place_tokens(*context, job.seq_id, job.pos, job.tokens, n_written, n_recompute);
            const size_t end = job.pos + n_written;
            writes.push_back({job.seq_id, begin, end, end - 1 - n_chain, inputs[i]});
            if (!job.tree.empty()) {
                writes.back().tree = &job.tree;
                writes.back().tree_hidden = hidden == nullptr ? nullptr : inputs[i] + job.n_tokens * n_columns;
            }
        }
        for (const sllm::Job & job :
             jobs) { // where a text begins is where the next one may leave it: another answer, the next turn of a chat
            if (sllm::sequence_at(*context, job.seq_id).start < 0) {
                sllm::save_checkpoint(*context, job.seq_id, N_VERIFY_CHECKPOINTS);
            }
        }
        std::fill_n(selected, width * jobs.size(), -1);
        if (logprobs != nullptr) {
            std::fill_n(logprobs, width * jobs.size(), 0.0F);
        }
        try {
            if (context->rollback == sllm::Rollback::checkpoints) {
                make_checkpoints(*context, jobs, writes);
            } else if (context->rollback == sllm::Rollback::snapshots) {
                level(*context, jobs, writes);
            }
            for (const std::vector<size_t> & group : grouped(*context, writes)) {
                std::vector<sllm::Write> together;
                together.reserve(group.size());
                for (const size_t i : group) {
                    together.push_back(writes[i]);
                }
                sllm::compute(*context, together, nullptr);
                const float * row = llama_get_logits(context->context.get());
                std::vector<size_t> last; // row of each that was accepted
                last.reserve(group.size());
                for (const size_t i : group) {
                    const Verdict verdict{selected + i * width, n_accepted + i, logprobs == nullptr ? nullptr : logprobs + i * width};
                    last.push_back(judge(*context, jobs[i], row, verdict));
                    row += (jobs[i].n_more + 1) * static_cast<size_t>(context->info.n_vocab);
                }
                for (size_t k = 0; k < group.size(); ++k) {
                    const size_t i = group[k];
                    const auto accepted = static_cast<size_t>(n_accepted[i]);
                    if (!jobs[i].tree.empty()) {
                        commit_tree(*context, jobs[i], last[k], selected + i * width, accepted);
                    }
                    sllm::sequence_at(*context, jobs[i].seq_id).n_committed = jobs[i].pos + jobs[i].n_tokens + accepted;
                    sllm::uncache(*context, jobs[i].seq_id, sllm::sequence_at(*context, jobs[i].seq_id).n_committed);
                }
            }
        } catch (...) { // back to where the caller's tokens began
            for (const sllm::Job & job : jobs) {
                sllm::sequence_at(*context, job.seq_id).n_committed = job.pos;
                sllm::uncache(*context, job.seq_id, job.pos);
            }
            throw;
        }
    });
}

} // extern "C"
