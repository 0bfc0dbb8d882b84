// Trees of tokens in llama.cpp's memory: what patch 0006 adds to it.

#pragma once

#include "internal.hpp"

#include "llama.h"

#include <cstdint>
#include <vector>

#ifndef SLLM_NO_TREES
// Declared in llama.cpp's src/llama-ext.h, which it does not install.
LLAMA_API void llama_set_tree(const uint16_t * nodes, const uint64_t * sees, uint32_t n_words);
LLAMA_API bool llama_memory_seq_rm_tree(llama_memory_t mem, llama_seq_id seq_id, llama_pos p0, const uint64_t * keep, uint32_t n_words);
#endif

namespace sllm {

// While it lives, the rows of this thread's llama_decode() are nodes of trees; null: they are not.
class TreeBatch {
  public:
    TreeBatch(const uint16_t * nodes, const uint64_t * sees) {
#ifndef SLLM_NO_TREES
        if (nodes != nullptr) {
            llama_set_tree(nodes, sees, N_TREE_WORDS);
        }
#else
        static_cast<void>(nodes);
        static_cast<void>(sees);
#endif
    }
    ~TreeBatch() {
#ifndef SLLM_NO_TREES
        llama_set_tree(nullptr, nullptr, 0);
#endif
    }
    TreeBatch(const TreeBatch &) = delete;
    TreeBatch & operator=(const TreeBatch &) = delete;
};

// The nodes of a tree, in their order, without those to which `keeps(i, node)` says no and without all that follow these; no more than
// `most`. `kept` receives which of the given ones each is, and has those before node i when that is asked about.
template <typename Keeps>
std::vector<Node> prune(const std::vector<Node> & all, size_t most, std::vector<int32_t> & kept, const Keeps & keeps) {
    kept.clear();
    std::vector<int32_t> place(all.size(), -1);
    std::vector<Node> tree;
    for (size_t i = 0; i < all.size(); ++i) {
        const Node & node = all[i];
        const int32_t parent = node.parent < 0 ? -1 : place[static_cast<size_t>(node.parent)];
        if ((node.parent >= 0 && parent < 0) || !keeps(i, node)) {
            continue;
        }
        if (tree.size() == most) {
            break;
        }
        place[i] = static_cast<int32_t>(tree.size());
        tree.push_back({node.token, parent, node.depth});
        kept.push_back(static_cast<int32_t>(i));
    }
    return tree;
}

} // namespace sllm
