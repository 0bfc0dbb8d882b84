// Trees of tokens in llama.cpp's memory: what patch 0006 adds to it.

#pragma once

#include "llama.h"

#include <cstdint>

#ifndef SLLM_NO_TREES
// Declared in llama.cpp's src/llama-ext.h, which it does not install.
LLAMA_API void llama_set_tree(const uint64_t * nodes, const uint64_t * sees);
LLAMA_API bool llama_memory_seq_rm_tree(llama_memory_t mem, llama_seq_id seq_id, llama_pos p0, uint64_t keep);
#endif

namespace sllm {

// While it lives, the rows of this thread's llama_decode() are nodes of trees; null: they are not.
class TreeBatch {
  public:
    TreeBatch(const uint64_t * nodes, const uint64_t * sees) {
#ifndef SLLM_NO_TREES
        if (nodes != nullptr) {
            llama_set_tree(nodes, sees);
        }
#else
        static_cast<void>(nodes);
        static_cast<void>(sees);
#endif
    }
    ~TreeBatch() {
#ifndef SLLM_NO_TREES
        llama_set_tree(nullptr, nullptr);
#endif
    }
    TreeBatch(const TreeBatch &) = delete;
    TreeBatch & operator=(const TreeBatch &) = delete;
};

} // namespace sllm
