// Loading some layers of a model.
#pragma once

#include "internal.hpp"

namespace sllm {

// The model that `params.header` and `params.pieces` describe; null where llama.cpp cannot load it.
llama_model * load_layers(const sllm_model_params & params, const llama_model_params & p);

void dequantize(int32_t type, const uint8_t * data, uint64_t size, int32_t n_rows, int32_t n_columns, float * out);

// The rows of a model's embedding, read from its file when they are asked for.
class EmbeddingRows {
  public:
    // Keeps the file open by a descriptor of its own.
    EmbeddingRows(const sllm_embedding & at, size_t width);
    ~EmbeddingRows();
    EmbeddingRows(const EmbeddingRows &) = delete;
    EmbeddingRows & operator=(const EmbeddingRows &) = delete;

    // Row `token` as `width` numbers; throws where the file does not have it any more.
    void read(llama_token token, float * out) const;

  private:
    sllm_embedding at;
    int32_t width;
    uint64_t row_size;
};

} // namespace sllm
