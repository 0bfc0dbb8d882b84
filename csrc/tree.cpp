// Trees of tokens: several ways in which a text may go on, computed as the rows of one batch.
//
// A node attends to what came before the tree and to the nodes on its own way from the root (tree attention: Miao et al., SpecInfer,
// 2305.09781). llama.cpp's memory knows sequences, and a row of several sequences where they share one cache; here the nodes of a
// tree are cells of one sequence, told apart by their numbers (patch 0006), so that every sequence keeps a stream of its own, whatever
// its neighbours do: the text stays what it is to the last bit.
//
// After the tree was judged, the first children of first children (the main path) are where a chain's tokens would be, one after the
// other behind the text, and stay as far as they were right. Nodes of other branches lie after those: they are dropped also where
// they were right, and computed again with the next pass. Cells with gaps between them would be filled in another order than
// that of the text, and sums taken in another order differ in their last bits.
//
// A branch is drafted from the runners-up of a selection, by the very noise by which the target will select: the token that the
// target prefers to the draft's own is most likely the one that the draft nearly chose.

#include "tree.hpp"
#include "internal.hpp"

#include <algorithm>
#include <array>
#include <cmath>
#include <numeric>

namespace sllm {

bool can_branch(const sllm_context & context) {
#ifdef SLLM_NO_TREES
    static_cast<void>(context);
    return false;
#else
    return context.rollback == Rollback::any && context.heads == nullptr;
#endif
}

std::vector<Node> read_tree(const int32_t * tokens, const int32_t * parents, size_t n, std::vector<int32_t> & order) {
    std::vector<std::vector<int32_t>> children(n + 1); // of node i: at i + 1
    for (size_t i = 0; i < n; ++i) {
        if (parents[i] < -1 || parents[i] >= static_cast<int32_t>(i)) {
            fail(SLLM_ERR_INVALID, "node %zu of a tree has the parent %d, expected -1 or an earlier node", i, parents[i]);
        }
        for (const int32_t other : children[static_cast<size_t>(parents[i] + 1)]) {
            if (tokens[other] == tokens[i]) {
                fail(SLLM_ERR_INVALID, "nodes %d and %zu of a tree have the same parent and the same token %d", other, i, tokens[i]);
            }
        }
        children[static_cast<size_t>(parents[i] + 1)].push_back(static_cast<int32_t>(i));
    }
    // Depth first, first children first: the main path comes first, and every branch in one piece.
    std::vector<Node> tree;
    tree.reserve(n);
    order.clear();
    std::vector<int32_t> place(n, -1); // of the given nodes in `tree`
    std::vector<int32_t> left(children[0].rbegin(), children[0].rend());
    while (!left.empty()) {
        const int32_t at = left.back();
        left.pop_back();
        const auto given = static_cast<size_t>(at);
        const int32_t parent = parents[given] < 0 ? -1 : place[static_cast<size_t>(parents[given])];
        const bool top = parent < 0;
        place[given] = static_cast<int32_t>(tree.size());
        tree.push_back({tokens[given], parent, top ? 0 : tree[static_cast<size_t>(parent)].depth + 1});
        order.push_back(at);
        const std::vector<int32_t> & next = children[given + 1];
        left.insert(left.end(), next.rbegin(), next.rend());
    }
    return tree;
}

size_t main_path(const std::vector<Node> & tree) {
    size_t n = 0;
    while (n < tree.size() && tree[n].parent == static_cast<int32_t>(n) - 1) {
        ++n;
    }
    return n;
}

void add_path(const Node * tree, int32_t last, uint64_t * words) {
    for (; last >= 0; last = tree[last].parent) {
        words[last / 64] |= uint64_t{1} << (last % 64);
    }
}

void keep_path(sllm_context & context, llama_seq_id seq_id, int32_t last) {
    Sequence & s = sequence_at(context, seq_id);
    if (s.tree.empty()) {
        return;
    }
    std::array<uint64_t, N_TREE_WORDS> keep{};
    add_path(s.tree.data(), last, keep.data());
#ifndef SLLM_NO_TREES
    llama_memory_seq_rm_tree(llama_get_memory(context.context.get()), seq_id, static_cast<llama_pos>(s.n_cached), keep.data(),
                             N_TREE_WORDS);
#endif
    s.n_cached += last < 0 ? 0 : static_cast<size_t>(s.tree[static_cast<size_t>(last)].depth) + 1;
    s.tree.clear();
}

void follow_tree(sllm_context & context, llama_seq_id seq_id, size_t pos, const int32_t * tokens, size_t n_tokens, size_t n_recompute) {
    Sequence & s = sequence_at(context, seq_id);
    if (s.tree.empty()) {
        return;
    }
    if (pos != s.n_cached) {
        uncache(context, seq_id, std::min(pos, s.n_cached));
        return;
    }
    int32_t parent = -1;
    std::vector<llama_token> same;
    while (same.size() + n_recompute < n_tokens) {
        const auto node = std::find_if(s.tree.begin(), s.tree.end(),
                                       [&](const Node & x) { return x.parent == parent && x.token == tokens[same.size()]; });
        if (node == s.tree.end()) {
            break;
        }
        parent = static_cast<int32_t>(node - s.tree.begin());
        same.push_back(node->token);
    }
    s.tokens.resize(pos);
    s.tokens.insert(s.tokens.end(), same.begin(), same.end());
    keep_path(context, seq_id, parent);
}

} // namespace sllm

namespace {

// So many tokens are considered after each computed node; more bring nothing (benchmarks/simulate.py, mode `trees`).
constexpr size_t N_CHILDREN = 6;

// A token that may follow in a draft's tree.
struct Candidate {
    llama_token token;
    int32_t parent; // among the candidates; -1: the root
    int32_t depth;
    int32_t rank;
    float prob;
    float chance;
    int32_t node = -1; // among the sequence's cached nodes; -1: it has not been computed
};

// One sequence's tree as it grows.
struct Growth {
    std::vector<Candidate> candidates;
    size_t n_computed = 0;
    std::vector<sllm::Selector> selectors; // after each computed node, where they depend on the text before
    sllm::Selector root;
    std::vector<int32_t> frontier; // the candidates in the pass that comes

    const Candidate & at(int32_t i) const { return candidates[static_cast<size_t>(i)]; }
    // Which node a candidate's parent is; -1: the root.
    int32_t node_above(int32_t i) const { return at(i).parent < 0 ? -1 : at(at(i).parent).node; }
};

// The best `n` candidates, likeliest first. A parent comes before its children: it is at least as likely, and was found before them.
std::vector<int32_t> best(const Growth & growth, size_t n) {
    std::vector<int32_t> order(growth.candidates.size());
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](int32_t a, int32_t b) { return growth.at(a).chance > growth.at(b).chance; });
    order.resize(std::min(n, order.size()));
    return order;
}

// Take the token into what the next selection depends on. False: it cannot follow.
bool accepts(sllm::Selector & selector, llama_token token) {
    try {
        selector.accept(token);
        return true;
    } catch (const std::exception &) {
        if (sllm::status_of_current_exception() == SLLM_ERR_INTERRUPTED) {
            throw;
        }
        return false;
    }
}

// One call of sllm_draft_tree().
class Drafting {
  public:
    Drafting(sllm_context & c, const std::vector<sllm::Job> & j, const int32_t * passes, const float * least, int32_t width)
        : context(c), jobs(j), n_passes(passes), p_min(least), branches(sllm::can_branch(c)), growths(j.size()), trees(j.size()) {
        if (width < 1) {
            sllm::fail(SLLM_ERR_INVALID, "width is %d, expected at least 1", width);
        }
        for (size_t i = 0; i < jobs.size(); ++i) {
            if (!(p_min[i] >= 0 && p_min[i] <= 1) || n_passes[i] < 1) {
                sllm::fail(SLLM_ERR_INVALID, "p_min is %g, expected 0 to 1, and n_max %d, expected at least 1",
                           static_cast<double>(p_min[i]), n_passes[i]);
            }
        }
        n_children = branches ? N_CHILDREN : 1;
        n_wide = branches ? std::min<size_t>(static_cast<size_t>(width), context.info.n_outputs_max / jobs.size()) : 1;
    }

    // Compute the committed tokens and the nodes that are known already, and find what may follow them.
    void begin(const sllm_tree & known, size_t stride) {
        std::vector<sllm::Write> writes;
        for (size_t i = 0; i < jobs.size(); ++i) {
            plant(i, known.tokens + i * stride, known.parents + i * stride, known.lengths[i], stride);
        }
        for (size_t i = 0; i < jobs.size(); ++i) {
            const sllm::Job & job = jobs[i];
            const size_t n_logits = job.n_more > 0 ? 1 : 0;
            const size_t from = sllm::place_tokens(context, job.seq_id, job.pos, job.tokens, job.n_tokens, n_logits);
            const size_t end = job.pos + job.n_tokens;
            writes.push_back({job.seq_id, from, end, end - n_logits, nullptr, 0, trees[i].empty() ? nullptr : &trees[i]});
            if (job.n_more > 0) {
                active.push_back(i);
            }
        }
        sllm::compute(context, writes, nullptr);
        for (const size_t i : active) {
            sllm::Sequence & s = sllm::sequence_at(context, jobs[i].seq_id);
            if (sllm::needs_history(*jobs[i].sampling)) {
                sllm::begin_selection(s.selector, s, jobs[i], sllm::resolve_start(s, jobs[i]));
                growths[i].root = s.selector.clone(); // drafted text must not reach the selector of the committed text
            } else {
                growths[i].root.begin(*jobs[i].sampling, {}, -1);
            }
        }
        for (const sllm::Job & job : jobs) {
            sllm::sequence_at(context, job.seq_id).n_committed = job.pos + job.n_tokens;
        }
        const float * row = llama_get_logits(context.context.get());
        for (const size_t i : active) {
            add_children(i, -1, growths[i].root, row);
            row += context.info.n_vocab;
            for (const sllm::Node & node : trees[i]) {
                follow(i, candidate_of(i, node), row);
                row += context.info.n_vocab;
            }
            if (!branches) {
                sllm::save_checkpoint(context, jobs[i].seq_id, sllm::N_DRAFT_CHECKPOINTS);
            }
        }
        n_done = 1;
    }

    // One more pass over the likeliest nodes. False: there is nothing left to compute, or the call is to end.
    bool grow() {
        std::vector<sllm::Write> writes;
        std::vector<size_t> still;
        for (const size_t i : active) {
            choose_frontier(i);
            if (!growths[i].frontier.empty()) {
                still.push_back(i);
                writes.push_back(write_of(i));
            }
        }
        active.swap(still);
        if (active.empty()) {
            return false;
        }
        try {
            sllm::compute(context, writes, nullptr);
        } catch (const sllm::Error & error) {
            for (const size_t i : active) {
                sllm::uncache(context, jobs[i].seq_id, sllm::sequence_at(context, jobs[i].seq_id).n_cached);
            }
            if (error.status == SLLM_ERR_CANCELLED || error.status == SLLM_ERR_FULL) {
                return false; // a draft is only a hint: a smaller one will do
            }
            throw;
        }
        ++n_done;
        const float * row = llama_get_logits(context.context.get());
        for (const size_t i : active) {
            for (const int32_t candidate : growths[i].frontier) {
                follow(i, candidate, row);
                row += context.info.n_vocab;
            }
        }
        return true;
    }

    // The likeliest of all candidates are the tree.
    void store(const sllm_tree & out, size_t stride) const {
        for (size_t i = 0; i < jobs.size(); ++i) {
            const Growth & growth = growths[i];
            const size_t base = i * stride;
            std::vector<int32_t> place(growth.candidates.size(), -1);
            int32_t n = 0;
            for (const int32_t c : best(growth, jobs[i].n_more)) {
                const Candidate & from = growth.at(c);
                const size_t at = base + static_cast<size_t>(n);
                place[static_cast<size_t>(c)] = n++;
                out.tokens[at] = from.token;
                out.parents[at] = from.parent < 0 ? -1 : place[static_cast<size_t>(from.parent)];
                out.ranks[at] = from.rank;
                out.probs[at] = from.prob;
                out.chances[at] = from.chance;
            }
            out.lengths[i] = n;
        }
        *out.n_passes = n_done;
    }

  private:
    // The known nodes of a job, as many as one pass can compute; not those that nothing can follow.
    void plant(size_t i, const int32_t * tokens, const int32_t * parents, int32_t length, size_t stride) {
        if (length < 0 || static_cast<size_t>(length) > stride) {
            sllm::fail(SLLM_ERR_INVALID, "a tree to go on from has %d nodes, not 0..%zu", length, stride);
        }
        const auto n = static_cast<size_t>(length);
        std::vector<int32_t> order;
        sllm::read_tree(tokens, parents, n, order); // throws where it is none
        sllm::check_tokens(context, tokens, n);
        if (!branches || jobs[i].n_more == 0) {
            return;
        }
        const size_t most = std::min(sllm::N_TREE_NODES, context.info.n_outputs_max / jobs.size() - 1);
        const size_t end = jobs[i].pos + jobs[i].n_tokens;
        std::vector<sllm::Node> all;
        for (size_t k = 0; k < n; ++k) {
            all.push_back({tokens[k], parents[k], parents[k] < 0 ? 0 : all[static_cast<size_t>(parents[k])].depth + 1});
        }
        trees[i] = sllm::prune(all, most, order, [&](size_t, const sllm::Node & node) {
            return !context.model.ends(node.token) && end + static_cast<size_t>(node.depth) + 1 < context.info.n_ctx_seq;
        });
    }

    // Which candidate a known node is; those before it were followed.
    int32_t candidate_of(size_t i, const sllm::Node & node) {
        Growth & growth = growths[i];
        int32_t parent = -1;
        if (node.parent >= 0) {
            const auto is_parent = [&](const Candidate & c) { return c.node == node.parent; };
            const auto found = std::find_if(growth.candidates.begin(), growth.candidates.end(), is_parent);
            parent = static_cast<int32_t>(found - growth.candidates.begin());
        }
        const auto is_node = [&](const Candidate & c) { return c.parent == parent && c.token == node.token; };
        const auto found = std::find_if(growth.candidates.begin(), growth.candidates.end(), is_node);
        if (found != growth.candidates.end()) {
            return static_cast<int32_t>(found - growth.candidates.begin());
        }
        // The draft would not have thought of it.
        const float above = parent < 0 ? 1.0F : growth.at(parent).chance;
        growth.candidates.push_back({node.token, parent, node.depth, static_cast<int32_t>(N_CHILDREN), 0.0F, 0.01F * above});
        return static_cast<int32_t>(growth.candidates.size()) - 1;
    }

    // Which candidates the next pass computes: of those that may be in the tree in the end, the likeliest, at any depth.
    void choose_frontier(size_t i) {
        const sllm::Job & job = jobs[i];
        Growth & growth = growths[i];
        growth.frontier.clear();
        const size_t room = n_done < n_passes[i] ? std::min(n_wide, sllm::N_TREE_NODES - growth.n_computed) : 0;
        for (const int32_t candidate : best(growth, job.n_more)) {
            const Candidate & c = growth.at(candidate);
            const size_t pos = job.pos + job.n_tokens + static_cast<size_t>(c.depth);
            const bool has_parent = c.parent < 0 || growth.at(c.parent).node >= 0;
            if (growth.frontier.size() < room && c.node < 0 && has_parent && c.chance >= p_min[i] && !context.model.ends(c.token) &&
                pos + 1 < context.info.n_ctx_seq) {
                growth.frontier.push_back(candidate);
            }
        }
        std::sort(growth.frontier.begin(), growth.frontier.end());
    }

    // The rows of the frontier: nodes beside the cached ones, or the next token of a chain.
    sllm::Write write_of(size_t i) {
        const Growth & growth = growths[i];
        sllm::Sequence & s = sllm::sequence_at(context, jobs[i].seq_id);
        if (!branches) {
            const size_t at = s.tokens.size();
            s.tokens.push_back(growth.at(growth.frontier.front()).token);
            return {jobs[i].seq_id, at, at + 1, at};
        }
        std::vector<sllm::Node> & tree = trees[i];
        tree = s.tree;
        for (const int32_t candidate : growth.frontier) {
            const int32_t parent = growth.node_above(candidate);
            tree.push_back({growth.at(candidate).token, parent, growth.at(candidate).depth});
        }
        return {jobs[i].seq_id, s.n_cached, s.n_cached, s.n_cached, nullptr, 0, &tree, s.tree.size()};
    }

    // A candidate was computed: find what may follow it.
    void follow(size_t i, int32_t candidate, const float * logits) {
        Growth & growth = growths[i];
        growth.candidates[static_cast<size_t>(candidate)].node = static_cast<int32_t>(growth.n_computed++);
        if (!sllm::needs_history(*jobs[i].sampling)) {
            add_children(i, candidate, growth.root, logits);
            return;
        }
        const int32_t above = growth.node_above(candidate);
        sllm::Selector after = (above < 0 ? growth.root : growth.selectors[static_cast<size_t>(above)]).clone();
        if (accepts(after, growth.at(candidate).token)) {
            add_children(i, candidate, after, logits);
        }
        growth.selectors.push_back(std::move(after));
    }

    // The tokens that may follow, each with the chance that the target takes this path: its parent's times its share among its
    // siblings and a little for all other tokens. The share is a softmax of the scores by which the draft would select. Under shared
    // noise that is calibrated on unlike pairs of models, for the first token and for its runners-up alike: benchmarks/RESULTS.md,
    // "Trees".
    void add_children(size_t i, int32_t parent, const sllm::Selector & selector, const float * logits) {
        Growth & growth = growths[i];
        const float above = parent < 0 ? 1.0F : growth.at(parent).chance;
        const int32_t depth = parent < 0 ? 0 : growth.at(parent).depth + 1;
        const size_t pos = jobs[i].pos + jobs[i].n_tokens + static_cast<size_t>(depth);
        std::vector<sllm::Ranked> ranked;
        try {
            // Of a chain too: how far the first is ahead of the next ones says how likely it is.
            ranked = selector.rank(logits, static_cast<int32_t>(pos), N_CHILDREN, context.selection);
        } catch (const std::exception &) {
            if (sllm::status_of_current_exception() == SLLM_ERR_INTERRUPTED) {
                throw;
            }
            return; // a smaller tree will do; what is wrong is the target's to say
        }
        const double tau = jobs[i].sampling->temperature == 0 ? 0.6 : 1.0;
        const auto weight = [&](const sllm::Ranked & one) { return std::exp((one.score - ranked.front().score) / tau); };
        double total = 0.01;
        for (const sllm::Ranked & one : ranked) {
            total += weight(one);
        }
        for (size_t k = 0; k < std::min(n_children, ranked.size()); ++k) {
            const float chance = above * static_cast<float>(weight(ranked[k]) / total);
            growth.candidates.push_back({ranked[k].token, parent, depth, static_cast<int32_t>(k), ranked[k].prob, chance});
        }
    }

    sllm_context & context;
    const std::vector<sllm::Job> & jobs;
    const int32_t * n_passes;
    const float * p_min;
    bool branches;
    size_t n_children;
    size_t n_wide;
    int32_t n_done = 0;
    std::vector<Growth> growths;
    std::vector<std::vector<sllm::Node>> trees; // what a pass refers to
    std::vector<size_t> active;                 // the jobs whose trees still grow
};

} // namespace

extern "C" {

int sllm_draft_tree(sllm_context * context, int32_t n_seqs, const int32_t * items, int32_t n_items, sllm_sampling * const * samplings,
                    const int32_t * n_passes, const float * p_min, int32_t width, int32_t stride, const struct sllm_tree * out) {
    return sllm::guarded([&] {
        const sllm::Entry entry(*context);
        sllm::check_hidden(*context, nullptr, 0);
        const std::vector<sllm::Job> jobs = sllm::read_jobs(*context, n_seqs, items, n_items, samplings, stride, false);
        const size_t n_out = jobs.size() * static_cast<size_t>(stride);
        Drafting drafting(*context, jobs, n_passes, p_min, width);
        drafting.begin(*out, static_cast<size_t>(stride));
        while (drafting.grow()) {
        }
        std::fill_n(out->tokens, n_out, -1);
        std::fill_n(out->parents, n_out, -1);
        std::fill_n(out->ranks, n_out, -1);
        std::fill_n(out->probs, n_out, 0.0F);
        std::fill_n(out->chances, n_out, 0.0F);
        drafting.store(*out, static_cast<size_t>(stride));
    });
}

int32_t sllm_has_trees(void) {
#ifdef SLLM_NO_TREES
    return 0;
#else
    return 1;
#endif
}

int sllm_context_can_branch(sllm_context * context, int32_t * can) {
    return sllm::guarded([&] {
        const sllm::Entry entry(*context);
        *can = sllm::can_branch(*context) ? 1 : 0;
    });
}

} // extern "C"
