// ggml's RPC backend: devices of other machines. rpc_server.cpp serves this one's.

#include "internal.hpp"

#include "ggml-backend.h"
#include "ggml-rpc.h"

#include <map>
#include <mutex>

namespace {

// Devices of servers are not entered into ggml's own registry: whoever lists that asks each device for its memory, and asking a
// server that has gone ends the process.
constexpr int32_t first_index = 1 << 20;

std::mutex servers_mutex;
std::vector<ggml_backend_dev_t> server_devices;

struct Range {
    int32_t first;
    int32_t count;
};

std::map<std::string, Range> servers;

// FNV-1a, 64 bits: what ggml's servers name cached tensors by.
uint64_t fnv1a(const uint8_t * data, uint64_t size, uint64_t hash) {
    for (uint64_t i = 0; i < size; ++i) {
        hash = (hash ^ data[i]) * 0x100000001b3ULL;
    }
    return hash;
}

// A function of the RPC backend's, which is linked in or a module, as the build has it.
template <class Function> Function rpc_function(const char * name) {
    ggml_backend_reg_t reg = ggml_backend_reg_by_name("RPC");
    void * found = reg == nullptr ? nullptr : ggml_backend_reg_get_proc_address(reg, name);
    if (found == nullptr) {
        sllm::fail(SLLM_ERR_UNSUPPORTED, "this build of sllm has no RPC backend; build it with -C cmake.define.GGML_RPC=ON");
    }
    return reinterpret_cast<Function>(found);
}

using AddServer = decltype(&ggml_backend_rpc_add_server);

} // namespace

namespace sllm {

ggml_backend_dev_t device_at(int32_t index) {
    if (index >= first_index) {
        const std::lock_guard<std::mutex> lock(servers_mutex);
        const auto i = static_cast<size_t>(index - first_index);
        if (i < server_devices.size()) {
            return server_devices[i];
        }
    } else if (index >= 0 && static_cast<size_t>(index) < ggml_backend_dev_count()) {
        return ggml_backend_dev_get(static_cast<size_t>(index));
    }
    fail(SLLM_ERR_INVALID, "there is no device %d", index);
}

} // namespace sllm

extern "C" {

int sllm_rpc_version(int32_t * version) {
    return sllm::guarded([&] {
        rpc_function<AddServer>("ggml_backend_rpc_add_server");
        version[0] = RPC_PROTO_MAJOR_VERSION;
        version[1] = RPC_PROTO_MINOR_VERSION;
        version[2] = RPC_PROTO_PATCH_VERSION;
    });
}

int sllm_rpc_add_server(const char * endpoint, int32_t * first, int32_t * count) {
    return sllm::guarded([&] {
        const auto add_server = rpc_function<AddServer>("ggml_backend_rpc_add_server");
        const std::lock_guard<std::mutex> lock(servers_mutex);
        auto found = servers.find(endpoint);
        if (found == servers.end()) {
            ggml_backend_reg_t reg = add_server(endpoint);
            const size_t n = reg == nullptr ? 0 : ggml_backend_reg_dev_count(reg);
            if (n == 0) {
                sllm::fail(SLLM_ERR_INTERNAL, "the RPC server at %s has no devices", endpoint);
            }
            const Range range{first_index + static_cast<int32_t>(server_devices.size()), static_cast<int32_t>(n)};
            for (size_t i = 0; i < n; ++i) {
                server_devices.push_back(ggml_backend_reg_dev_get(reg, i));
            }
            found = servers.emplace(endpoint, range).first;
        }
        *first = found->second.first;
        *count = found->second.count;
    });
}

uint64_t sllm_rpc_hash(const uint8_t * data, uint64_t size, uint64_t before) {
    return fnv1a(data, size, before == 0 ? 0xcbf29ce484222325ULL : before);
}

} // extern "C"
