// The memory of each sequence as a cache of its tokens: writing, taking back, copying, saving.
//
// What can be taken back depends on the kind of memory. Attention keeps every position apart: any number of tokens can go. A
// recurrent state is a sum over all tokens: what came before is gone, unless it was kept. llama.cpp keeps the states after the last
// `n_rollback` tokens of a decode (llama_context_params.n_rs_seq, "snapshots") for the architectures that it taught that; for
// everything else a copy of the state is saved where a rollback may lead to ("checkpoints"), and the tokens from there on are
// computed again. Attention positions of hybrid models are never saved: they only need truncating.

#include "internal.hpp"
#include "mtp.hpp"

#include <algorithm>

namespace {

bool remove_from(sllm_context & context, llama_seq_id seq_id, size_t length) {
    return llama_memory_seq_rm(llama_get_memory(context.context.get()), seq_id, static_cast<llama_pos>(length), -1);
}

void remove_all(sllm_context & context, llama_seq_id seq_id) {
    llama_memory_seq_rm(llama_get_memory(context.context.get()), seq_id, -1, -1); // removing a whole sequence never fails
    sllm::Sequence & s = context.sequences[static_cast<size_t>(seq_id)];
    s.n_cached = 0;
    s.depth = 0;
}

// Forget what is known of a sequence whose memory was cleared.
void empty(sllm_context & context, llama_seq_id seq_id) {
    context.sequences[static_cast<size_t>(seq_id)] = sllm::Sequence{};
    if (context.heads != nullptr) {
        context.heads->cut(seq_id, 0);
    }
}

// Put the state of the newest checkpoint at or before `length` back; false where there is none, or llama.cpp cannot.
bool restore(sllm_context & context, llama_seq_id seq_id, size_t length) {
    sllm::Sequence & s = context.sequences[static_cast<size_t>(seq_id)];
    while (!s.checkpoints.empty() && s.checkpoints.back().pos > length) {
        s.checkpoints.pop_back();
    }
    if (s.checkpoints.empty()) {
        return false;
    }
    const sllm::Checkpoint & from = s.checkpoints.back();
    // In this order: the attention positions can only be truncated once the recurrent state ends where they shall.
    if (llama_state_seq_set_data_ext(context.context.get(), from.state->data(), from.state->size(), seq_id,
                                     LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY) == 0 ||
        !remove_from(context, seq_id, from.pos)) {
        s.checkpoints.clear();
        return false;
    }
    s.n_cached = from.pos;
    s.depth = 0;
    return true;
}

// Which of the checkpoints to give up: the one whose loss makes a rollback longer by least, for how far back it leads.
size_t least_useful(const std::vector<sllm::Checkpoint> & checkpoints) {
    size_t best = 0;
    double least = 2;
    for (size_t i = 0; i + 1 < checkpoints.size(); ++i) {
        const size_t before = i == 0 ? 0 : checkpoints[i - 1].pos;
        const double loss = static_cast<double>(checkpoints[i].pos - before) / static_cast<double>(checkpoints.back().pos - before);
        if (loss < least) {
            least = loss;
            best = i;
        }
    }
    return best;
}

// llama.cpp puts the copying of a sequence's memory off to its next decode, and would by then copy what was loaded meanwhile.
void finish_copies(sllm_context & context) {
    if (!context.copies_pending) {
        return;
    }
    // Any sequence will do that has room for a token, an empty one before others: then there is nothing that could be lost.
    size_t best = 0;
    for (size_t i = 1; i < context.sequences.size(); ++i) {
        if (context.sequences[i].n_cached < context.sequences[best].n_cached) {
            best = i;
        }
    }
    const auto seq_id = static_cast<llama_seq_id>(best);
    sllm::Sequence & s = context.sequences[best];
    if (s.n_cached == context.info.n_ctx_seq) {
        sllm::uncache(context, seq_id, s.n_cached - 1); // computed again at the next write
    }
    const size_t before = s.n_cached;
    s.tokens.resize(std::max(s.tokens.size(), before + 1));
    sllm::decode_aborted(context, {{seq_id, before, false}});
    sllm::uncache(context, seq_id, before);
    context.copies_pending = false;
}

// Bring llama.cpp's cache to exactly the committed tokens of one sequence.
void settle(sllm_context & context, llama_seq_id seq_id) {
    sllm::Sequence & s = sllm::sequence_at(context, seq_id);
    sllm::uncache(context, seq_id, s.n_committed);
    if (s.n_cached < s.n_committed) {
        sllm::compute(context, {{seq_id, s.n_cached, s.n_committed, s.n_committed}}, nullptr);
    }
    finish_copies(context);
}

// Copy what is cached of one sequence to another, an empty one. llama_memory_seq_cp() lets both share a recurrent state, which a
// rollback of one would take from the other: there the state goes through the host.
void copy_cache(sllm_context & context, llama_seq_id source, llama_seq_id target) {
    const sllm::Sequence & from = context.sequences[static_cast<size_t>(source)];
    sllm::Sequence & to = context.sequences[static_cast<size_t>(target)];
    llama_context * c = context.context.get();
    if (context.rollback == sllm::Rollback::any) {
        llama_memory_seq_cp(llama_get_memory(c), source, target, -1, -1);
        context.copies_pending = true;
        to.n_cached = from.n_cached;
        return;
    }
    std::vector<uint8_t> state(llama_state_seq_get_size(c, source));
    const size_t size = llama_state_seq_get_data(c, state.data(), state.size(), source);
    if (size > 0 && llama_state_seq_set_data(c, state.data(), size, target) > 0) {
        to.n_cached = from.n_cached;
        to.checkpoints = from.checkpoints;
    } else {
        remove_all(context, target); // its tokens are computed again at the next write
    }
}

} // namespace

namespace sllm {

size_t checked_position(sllm_context & context, int32_t seq_id, int32_t pos, size_t n_tokens) {
    const Sequence & s = sequence_at(context, seq_id);
    if (pos < -1) {
        fail(SLLM_ERR_INVALID, "position %d of sequence %d is negative", pos, seq_id);
    }
    const size_t begin = pos < 0 ? s.n_committed : static_cast<size_t>(pos);
    if (begin > s.n_committed) {
        fail(SLLM_ERR_INVALID, "position %zu leaves a gap: sequence %d ends at %zu", begin, seq_id, s.n_committed);
    }
    if (begin + n_tokens > context.info.n_ctx_seq) {
        fail(SLLM_ERR_FULL, "%zu tokens at position %zu do not fit: a sequence of this context holds %u", n_tokens, begin,
             context.info.n_ctx_seq);
    }
    return begin;
}

void save_checkpoint(sllm_context & context, llama_seq_id seq_id, size_t n_kept) {
    Sequence & s = context.sequences[static_cast<size_t>(seq_id)];
    if (context.rollback == Rollback::any || s.n_cached == 0 || (!s.checkpoints.empty() && s.checkpoints.back().pos == s.n_cached)) {
        return;
    }
    llama_context * c = context.context.get();
    const size_t size = llama_state_seq_get_size_ext(c, seq_id, LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY);
    auto state = std::make_shared<std::vector<uint8_t>>(size);
    if (llama_state_seq_get_data_ext(c, state->data(), size, seq_id, LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY) != size) {
        return; // without it a rollback computes more tokens again
    }
    s.checkpoints.push_back({s.n_cached, std::move(state)});
    while (s.checkpoints.size() > n_kept) {
        s.checkpoints.erase(s.checkpoints.begin() + static_cast<std::ptrdiff_t>(least_useful(s.checkpoints)));
    }
}

void uncache(sllm_context & context, llama_seq_id seq_id, size_t length) {
    Sequence & s = context.sequences[static_cast<size_t>(seq_id)];
    if (context.heads != nullptr) {
        context.heads->cut(seq_id, length);
    }
    while (!s.checkpoints.empty() && s.checkpoints.back().pos > length) {
        s.checkpoints.pop_back();
    }
    if (!s.tree.empty()) {
        remove_from(context, seq_id, s.n_cached);
        s.tree.clear();
    }
    if (s.n_cached > length) {
        const bool rolls_back = context.rollback == Rollback::any || s.n_cached - length <= s.depth;
        if (length > 0 && rolls_back && remove_from(context, seq_id, length)) {
            s.n_cached = length;
            s.depth = 0; // llama.cpp takes one rollback between two decodes
        } else if (!restore(context, seq_id, length)) {
            remove_all(context, seq_id);
        }
    }
    if (context.model.is_layers) {
        s.n_committed = std::min(s.n_committed, s.n_cached); // what is not held has to be sent again: there is no row to compute it from
    }
    s.tokens.resize(std::max(s.n_committed, s.n_cached));
}

void note_decoded(sllm_context & context, const std::vector<size_t> & n_rows, bool in_order) {
    if (context.rollback == Rollback::any) {
        return;
    }
    if (context.info.state_bytes == 0) {
        const auto some = std::find_if(n_rows.begin(), n_rows.end(), [](size_t n) { return n > 0; });
        context.info.state_bytes = llama_state_seq_get_size_ext(context.context.get(), static_cast<llama_seq_id>(some - n_rows.begin()),
                                                                LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY);
    }
    size_t n_seqs = 0;
    size_t total = 0;
    bool one_graph = in_order; // llama.cpp computes them as one: equally many rows of sequences that follow one another
    size_t before = 0;
    for (size_t i = 0; i < n_rows.size(); ++i) {
        if (n_rows[i] > 0) {
            one_graph = one_graph && (n_seqs == 0 || (n_rows[i] == n_rows[before] && (context.kv_unified || before + 1 == i)));
            before = i;
            total += n_rows[i];
            ++n_seqs;
        }
    }
    one_graph = n_seqs == 1 || (one_graph && total <= context.info.n_ubatch);
    for (size_t i = 0; i < context.sequences.size(); ++i) {
        if (n_rows[i] > 0 && one_graph && context.rollback == Rollback::snapshots) {
            context.sequences[i].depth = std::min<size_t>(context.info.n_rollback, n_rows[i] - 1);
        } else if (n_seqs > 1 || n_rows[i] > 0) {
            // A graph of several sequences gathers their states side by side, and whatever stood there before moves: the newest state
            // alone, not its snapshots.
            context.sequences[i].depth = 0;
        }
    }
}

void note_failed(sllm_context & context, const std::vector<size_t> & n_rows) {
    for (size_t i = 0; i < context.sequences.size(); ++i) {
        Sequence & s = context.sequences[i];
        const auto seq_id = static_cast<llama_seq_id>(i);
        if (context.rollback == Rollback::any) {
            if (n_rows[i] > 0) { // llama.cpp may have kept some of its ubatches: what lies at or after our count goes
                const size_t before = s.n_cached;
                s.n_cached = before + 1; // uncache() looks at the cache itself only when there is something to drop
                uncache(context, seq_id, before);
            }
        } else if (n_rows[i] > 0 || (context.kv_unified && s.n_cached > 0)) {
            // A recurrent state was overwritten, and with a unified cache those of others may have been moved; llama.cpp's answers
            // to what it holds are not to be trusted.
            if (!restore(context, seq_id, s.n_cached)) {
                remove_all(context, seq_id);
            }
            uncache(context, seq_id, s.n_cached);
        }
    }
}

size_t place_tokens(sllm_context & context, llama_seq_id seq_id, size_t pos, const int32_t * tokens, size_t n_tokens, size_t n_recompute) {
    Sequence & s = context.sequences[static_cast<size_t>(seq_id)];
    follow_tree(context, seq_id, pos, tokens, n_tokens, n_recompute);
    size_t keep = std::min(pos, s.n_cached);
    if (keep == pos) {
        const size_t limit = std::min(n_tokens - n_recompute, s.n_cached - pos);
        size_t same = 0;
        while (same < limit && s.tokens[pos + same] == tokens[same]) {
            ++same;
        }
        keep += same;
    }
    const size_t before = s.n_committed;
    s.n_committed = pos;
    uncache(context, seq_id, keep);
    if (context.model.is_layers && s.n_cached < pos) {
        fail(SLLM_ERR_INVALID, "sequence %d goes back from %zu positions to %zu at most, not to %zu: send the rows from there on again",
             seq_id, before, s.n_cached, pos);
    }
    s.tokens.resize(pos);
    s.tokens.insert(s.tokens.end(), tokens, tokens + n_tokens);
    if (s.start > static_cast<int64_t>(pos)) {
        s.start = -1;
    }
    return s.n_cached;
}

} // namespace sllm

extern "C" {

int sllm_memory_length(sllm_context * context, int32_t seq_id, int32_t * length) {
    return sllm::guarded([&] {
        const sllm::Entry entry(*context);
        *length = static_cast<int32_t>(sllm::sequence_at(*context, seq_id).n_committed);
    });
}

int sllm_memory_tokens(sllm_context * context, int32_t seq_id, int32_t * tokens, int32_t capacity, int32_t * n_tokens) {
    return sllm::guarded([&] {
        const sllm::Entry entry(*context);
        const sllm::Sequence & s = sllm::sequence_at(*context, seq_id);
        *n_tokens = static_cast<int32_t>(s.n_committed);
        const size_t n = std::min(s.n_committed, static_cast<size_t>(std::max(capacity, 0)));
        std::copy_n(s.tokens.begin(), n, tokens);
    });
}

int sllm_memory_truncate(sllm_context * context, int32_t seq_id, int32_t length) {
    return sllm::guarded([&] {
        const sllm::Entry entry(*context);
        sllm::Sequence & s = sllm::sequence_at(*context, seq_id);
        if (length < 0 || static_cast<size_t>(length) > s.n_committed) {
            sllm::fail(SLLM_ERR_INVALID, "cannot truncate sequence %d to %d: its length is %zu", seq_id, length, s.n_committed);
        }
        s.n_committed = static_cast<size_t>(length);
        sllm::uncache(*context, seq_id, s.n_committed);
        if (s.start > length) {
            s.start = -1;
        }
    });
}

int sllm_memory_forget(sllm_context * context, int32_t seq_id) {
    return sllm::guarded([&] {
        const sllm::Entry entry(*context);
        sllm::Sequence & s = sllm::sequence_at(*context, seq_id);
        s.n_committed = 0;
        s.start = -1;
        if (context->kv_unified) {
            sllm::uncache(*context, seq_id, 0);
        }
    });
}

int sllm_memory_copy(sllm_context * context, int32_t source, int32_t target) {
    return sllm::guarded([&] {
        const sllm::Entry entry(*context);
        sllm::Sequence & from = sllm::sequence_at(*context, source);
        sllm::Sequence & to = sllm::sequence_at(*context, target);
        if (source == target) {
            return;
        }
        sllm::uncache(*context, source, from.n_committed);
        remove_all(*context, target);
        to = sllm::Sequence{};
        to.tokens = from.tokens;
        to.n_committed = from.n_committed;
        to.start = from.start;
        if (from.n_cached > 0) {
            copy_cache(*context, source, target);
            sllm::uncache(*context, target, from.n_committed);
        }
        if (context->heads != nullptr) {
            context->heads->copy(source, target);
        }
    });
}

int sllm_memory_clear(sllm_context * context, int32_t seq_id) {
    return sllm::guarded([&] {
        const sllm::Entry entry(*context);
        if (seq_id == -1) {
            llama_memory_clear(llama_get_memory(context->context.get()), false);
            for (size_t i = 0; i < context->sequences.size(); ++i) {
                empty(*context, static_cast<llama_seq_id>(i));
            }
            return;
        }
        sllm::sequence_at(*context, seq_id);
        llama_memory_seq_rm(llama_get_memory(context->context.get()), seq_id, -1, -1);
        empty(*context, seq_id);
    });
}

int sllm_state_size(sllm_context * context, int32_t seq_id, uint64_t * size) {
    return sllm::guarded([&] {
        const sllm::Entry entry(*context);
        sllm::check_hidden(*context, nullptr, 0);
        settle(*context, seq_id);
        *size = llama_state_seq_get_size(context->context.get(), seq_id);
    });
}

int sllm_state_get(sllm_context * context, int32_t seq_id, uint8_t * data, uint64_t capacity, uint64_t * size) {
    return sllm::guarded([&] {
        const sllm::Entry entry(*context);
        sllm::check_hidden(*context, nullptr, 0);
        settle(*context, seq_id);
        *size = llama_state_seq_get_data(context->context.get(), data, capacity, seq_id);
        if (*size == 0) {
            sllm::fail(SLLM_ERR_COMPUTE, "llama.cpp could not save the state: %s", sllm::Guard::logged_errors().c_str());
        }
    });
}

int sllm_state_set(sllm_context * context, int32_t seq_id, const uint8_t * data, uint64_t size, const int32_t * tokens, int32_t n_tokens) {
    return sllm::guarded([&] {
        const sllm::Entry entry(*context);
        sllm::check_hidden(*context, nullptr, 0);
        sllm::Sequence & s = sllm::sequence_at(*context, seq_id);
        if (n_tokens < 0 || static_cast<uint32_t>(n_tokens) > context->info.n_ctx_seq) {
            sllm::fail(SLLM_ERR_FULL, "the saved state has %d tokens, and a sequence of this context holds %u", n_tokens,
                       context->info.n_ctx_seq);
        }
        sllm::check_tokens(*context, tokens, static_cast<size_t>(n_tokens));
        finish_copies(*context);
        llama_memory_t memory = llama_get_memory(context->context.get());
        llama_memory_seq_rm(memory, seq_id, -1, -1);
        empty(*context, seq_id);
        const bool loaded = llama_state_seq_set_data(context->context.get(), data, size, seq_id) > 0;
        if (!loaded || llama_memory_seq_pos_max(memory, seq_id) + 1 != n_tokens) {
            llama_memory_seq_rm(memory, seq_id, -1, -1);
            sllm::fail(SLLM_ERR_INVALID,
                       "the saved state does not fit this context (another model, type_k, type_v, n_seq_max or kv_unified): %s",
                       sllm::Guard::logged_errors().c_str());
        }
        s.tokens.assign(tokens, tokens + n_tokens);
        s.n_committed = s.n_cached = s.tokens.size();
    });
}

} // extern "C"
