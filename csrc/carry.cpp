// What stands between the open port and gRPC: bytes of one connection, carried from socket to socket.
//
// In C, because a thread that waits here holds no lock of Python's: a hint is not late because other threads compute.

#include "sllm.h"

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cstddef>
#include <memory>
#include <new>

#include <poll.h>
#include <sys/socket.h>
#include <sys/types.h>

namespace {

using Clock = std::chrono::steady_clock;
using std::chrono::milliseconds;

constexpr size_t buffer_size = 1 << 16;

constexpr milliseconds refusal_time{1000}; // for the answer to a refused call to get away
constexpr milliseconds ending_time{5000};  // for the last bytes, after either end has closed

#ifdef MSG_NOSIGNAL
constexpr int send_flags = MSG_DONTWAIT | MSG_NOSIGNAL;
#else
constexpr int send_flags = MSG_DONTWAIT; // Python ignores SIGPIPE
#endif

bool try_again() { return errno == EAGAIN || errno == EWOULDBLOCK || errno == EINTR; }

// One direction: what was read of `from` and is not written to `to` yet. Nothing is read before all of it is.
class Stream {
  public:
    Stream(int from, int to) : from_(from), to_(to), data_(new char[buffer_size]) {}

    bool open() const { return open_; }
    bool waits() const { return begin_ < end_; }
    short wanted(size_t at_most) const { return open_ && !waits() && at_most > 0 ? POLLIN : 0; }

    // Read at most so many bytes; returns how many came. What fails or ends closes the stream.
    size_t read(size_t at_most) {
        const ssize_t n = recv(from_, data_.get(), std::min(at_most, buffer_size), MSG_DONTWAIT);
        if (n > 0) {
            begin_ = 0;
            end_ = static_cast<size_t>(n);
            return end_;
        }
        open_ = n < 0 && try_again();
        return 0;
    }

    void write() {
        while (waits()) {
            const ssize_t n = send(to_, data_.get() + begin_, end_ - begin_, send_flags);
            if (n < 0) {
                if (!try_again()) {
                    close();
                }
                return;
            }
            begin_ += static_cast<size_t>(n);
        }
    }

    void close() {
        open_ = false;
        begin_ = end_ = 0;
    }

  private:
    int from_;
    int to_;
    std::unique_ptr<char[]> data_; // not initialised: pages that a stranger does not fill take no memory
    size_t begin_ = 0;
    size_t end_ = 0;
    bool open_ = true;
};

class Connection {
  public:
    Connection(int client, int server, const int32_t * standing, const int64_t * max_bytes, int32_t max_ms)
        : client_(client), server_(server), standing_(standing), max_bytes_(max_bytes), until_(Clock::now() + milliseconds(max_ms)),
          up_(client, server), down_(server, client) {}

    // Until the connection ends; whether it was cut.
    bool run() {
        while (down_.open() || down_.waits()) {
            look();
            const milliseconds left = std::chrono::ceil<milliseconds>(until_ - Clock::now());
            if (bounded_ && left.count() <= 0) {
                return !ending_;
            }
            if (!step(left)) {
                return false;
            }
        }
        say_goodbye();
        return false;
    }

  private:
    void look() {
        const int32_t standing = __atomic_load_n(standing_, __ATOMIC_ACQUIRE);
        if (standing == SLLM_CLIENT_REFUSED && !refused_) {
            refused_ = true;
            until_ = std::min(until_, Clock::now() + refusal_time);
        }
        if ((!up_.open() || !down_.open()) && !ending_) {
            ending_ = true;
            until_ = Clock::now() + ending_time;
            if (!up_.open()) {
                shutdown(server_, SHUT_WR);
            }
        }
        admitted_ = standing == SLLM_CLIENT_ADMITTED;
        bounded_ = !admitted_ || ending_;
        const int64_t left = __atomic_load_n(max_bytes_, __ATOMIC_ACQUIRE) - n_read_;
        may_read_ = admitted_ ? buffer_size : refused_ || left <= 0 ? 0 : static_cast<size_t>(left);
    }

    // Wait for something to do, and do it; false: the client is gone.
    bool step(milliseconds left) {
        pollfd ends[2] = {{client_, up_.wanted(may_read_), 0}, {server_, down_.wanted(buffer_size), 0}};
        if (up_.waits()) {
            ends[1].events |= POLLOUT;
        }
        if (down_.waits()) {
            ends[0].events |= POLLOUT;
        }
        if (ends[1].events == 0 && (ending_ || down_.waits())) {
            ends[1].fd = -1; // closed, as it may be, it would wake this thread again and again
        }
        int wait = bounded_ ? static_cast<int>(left.count()) : -1;
        if (may_read_ == 0 && !refused_) {
            // Its token is being looked at, which takes gRPC a moment, and nothing tells of it but what is shared.
            wait = std::min(wait, pause_);
            pause_ = std::min(2 * pause_, 64);
        } else {
            pause_ = 1;
        }
        if (poll(ends, 2, wait) < 0) {
            return errno == EINTR;
        }
        if ((ends[0].revents & (POLLERR | POLLHUP | POLLNVAL)) != 0 && (ends[0].revents & POLLIN) == 0) {
            return false;
        }
        if ((ends[0].revents & POLLIN) != 0) {
            n_read_ += static_cast<int64_t>(up_.read(may_read_));
        }
        if ((ends[1].revents & (POLLIN | POLLHUP | POLLERR)) != 0 && !down_.waits()) {
            down_.read(buffer_size);
        }
        up_.write();
        down_.write();
        return true;
    }

    // Closing a socket that holds unread bytes takes from the client what it has not read yet.
    void say_goodbye() {
        char unread[4096];
        shutdown(client_, SHUT_WR);
        const auto until = Clock::now() + refusal_time;
        for (int n_reads = 0; n_reads < 256; ++n_reads) {
            const auto left = std::chrono::duration_cast<milliseconds>(until - Clock::now()).count();
            pollfd end = {client_, POLLIN, 0};
            if (left <= 0 || poll(&end, 1, static_cast<int>(left)) <= 0 || recv(client_, unread, sizeof unread, MSG_DONTWAIT) <= 0) {
                return;
            }
        }
    }

    int client_;
    int server_;
    const int32_t * standing_;
    const int64_t * max_bytes_;
    int64_t n_read_ = 0;  // bytes of the client
    size_t may_read_ = 0; // so many more, for now
    Clock::time_point until_;
    Stream up_;
    Stream down_;
    int pause_ = 1;
    bool admitted_ = false;
    bool refused_ = false;
    bool ending_ = false;
    bool bounded_ = true;
};

} // namespace

int sllm_carry(int client, int server, const int32_t * standing, const int64_t * max_bytes, int32_t max_ms) {
    try {
        return Connection(client, server, standing, max_bytes, max_ms).run() ? 1 : 0;
    } catch (const std::bad_alloc &) {
        return 1;
    }
}
