// Trees of tokens in llama.cpp's memory: what patch 0006 adds to it.

#pragma once

#include "internal.hpp"

#include "llama.h"

#include <cstdint>

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

} // namespace sllm
