// Loading some layers of a model.
#pragma once

#include "internal.hpp"

namespace sllm {

// The model that `params.header` and `params.pieces` describe; null where llama.cpp cannot load it.
llama_model * load_layers(const sllm_model_params & params, const llama_model_params & p);

} // namespace sllm
