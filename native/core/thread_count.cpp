// How many threads to use when the user does not say.
#include <algorithm>
#include <cstdio>
#include <map>
#include <set>
#include <string>
#include <thread>
#include <utility>

#include "core/thread_pool.h"

#if defined(__linux__)
#include <sched.h>
#include <unistd.h>
#endif

namespace nybble {

namespace {

struct Choice {
    int threads = 1;
    std::string reason;
};

#if defined(__linux__)
constexpr int kMostNodes = 64;

std::string read_line(const std::string& path) {
    std::string line;
    if (FILE* file = std::fopen(path.c_str(), "r")) {
        char buffer[512];
        if (std::fgets(buffer, sizeof buffer, file) != nullptr) {
            line = buffer;
            while (!line.empty() && (line.back() == '\n' || line.back() == ' ')) {
                line.pop_back();
            }
        }
        std::fclose(file);
    }
    return line;
}

// The smallest CPU quota on the way from this process's control group to the root, or 0 for none.
double cgroup_quota() {
    double smallest = 0;
    auto take = [&](double quota, double period) {
        if (quota > 0 && period > 0) {
            const double cpus = quota / period;
            smallest = smallest == 0 ? cpus : std::min(smallest, cpus);
        }
    };
    FILE* file = std::fopen("/proc/self/cgroup", "r");
    if (file == nullptr) {
        return 0;
    }
    char line[1024];
    while (std::fgets(line, sizeof line, file) != nullptr) {
        std::string text(line);
        while (!text.empty() && text.back() == '\n') {
            text.pop_back();
        }
        const size_t first = text.find(':');
        const size_t second = first == std::string::npos ? first : text.find(':', first + 1);
        if (second == std::string::npos) {
            continue;
        }
        const std::string controllers = text.substr(first + 1, second - first - 1);
        std::string path = text.substr(second + 1);
        const bool v2 = controllers.empty();
        if (!v2 && ("," + controllers + ",").find(",cpu,") == std::string::npos) {
            continue;
        }
        for (;;) {
            if (v2) {
                const std::string text_max = read_line("/sys/fs/cgroup" + path + "/cpu.max");
                double quota = 0;
                double period = 0;
                if (std::sscanf(text_max.c_str(), "%lf %lf", &quota, &period) == 2) {
                    take(quota, period);
                }
            } else {
                const std::string base = "/sys/fs/cgroup/cpu" + path;
                double quota = 0;
                double period = 0;
                if (std::sscanf(read_line(base + "/cpu.cfs_quota_us").c_str(), "%lf", &quota) == 1 &&
                    std::sscanf(read_line(base + "/cpu.cfs_period_us").c_str(), "%lf", &period) == 1) {
                    take(quota, period);
                }
            }
            if (path.empty() || path == "/") {
                break;
            }
            path.resize(path.rfind('/'));
        }
    }
    std::fclose(file);
    return smallest;
}

// Memory node of a CPU: its folder holds a link named nodeN. 0 where the system does not tell.
int memory_node(int cpu) {
    const std::string base = "/sys/devices/system/cpu/cpu" + std::to_string(cpu) + "/node";
    for (int node = 0; node < kMostNodes; ++node) {
        if (access((base + std::to_string(node)).c_str(), F_OK) == 0) {
            return node;
        }
    }
    return 0;
}

Choice choose() {
    Choice choice;
    cpu_set_t set;
    CPU_ZERO(&set);
    int allowed = 0;
    // By memory node: (package, core) of every allowed CPU. A core with two hyper-threads counts once.
    std::map<int, std::set<std::pair<std::string, std::string>>> nodes;
    if (sched_getaffinity(0, sizeof set, &set) == 0) {
        for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu) {
            if (!CPU_ISSET(cpu, &set)) {
                continue;
            }
            ++allowed;
            const std::string base = "/sys/devices/system/cpu/cpu" + std::to_string(cpu) + "/topology/";
            const std::string core = read_line(base + "core_id");
            if (!core.empty()) {
                nodes[memory_node(cpu)].emplace(read_line(base + "physical_package_id"), core);
            }
        }
    }
    if (allowed == 0) {
        allowed = std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
    }
    choice.threads = allowed;
    choice.reason = std::to_string(allowed) + " logical CPUs allowed";
    size_t cores = 0;
    for (const auto& [node, members] : nodes) {
        cores = std::max(cores, members.size());
    }
    if (cores > 0) {
        choice.threads = static_cast<int>(cores);
        choice.reason += ", " + std::to_string(cores) + " cores";
        if (nodes.size() > 1) {
            // Weights lie in one node's memory; reading them from another costs more than its cores bring.
            choice.reason += " on the largest of " + std::to_string(nodes.size()) + " memory nodes";
        }
    }
    const double quota = cgroup_quota();
    if (quota > 0 && quota < choice.threads) {
        choice.threads = std::max(1, static_cast<int>(quota + 0.5));
        char text[64];
        std::snprintf(text, sizeof text, ", limited to %.2f CPUs by a cgroup", quota);
        choice.reason += text;
    }
    return choice;
}
#else
Choice choose() {
    const int allowed = std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
    return {allowed, std::to_string(allowed) + " logical CPUs"};
}
#endif

const Choice& choice() {
    static const Choice value = choose();
    return value;
}

}  // namespace

int default_thread_count() { return choice().threads; }

const char* default_thread_count_reason() { return choice().reason.c_str(); }

}  // namespace nybble
