// Runs launches that a file describes, each buffer in memory of exactly its size: for builds with a sanitizer, which
// cannot be loaded into a running interpreter.
//
//   replay INPUT OUTPUT order,late,multiprocessors,seed,mutant ...
//
// All numbers are int64. INPUT: buffers (count; size and bytes of each), then steps (count; number of grids of each; of
// each grid: length and bytes of its name, blocks, threads, shared bytes, arguments (count; of each a kind and a value:
// 0 buffer, 1 int32, 2 table: count and buffers)). OUTPUT, for each schedule: the report, then the buffers' bytes.
#include "entry.cpp"

#include <stdlib.h>

#include <memory>
#include <string>
#include <vector>

namespace {

using Bytes = std::unique_ptr<unsigned char[]>;

struct Buffer {
  long long size;
  Bytes initial, now;
};

struct Argument {
  long long kind, value;
  std::vector<long long> table;
};

struct Described {
  std::string kernel;
  long long blocks, threads, shared_bytes;
  std::vector<Argument> arguments;
};

long long number(FILE* file) {
  long long value;
  if (fread(&value, 8, 1, file) != 1) exit(3);
  return value;
}

Bytes bytes(FILE* file, long long size) {
  Bytes read(new unsigned char[size]);
  if (size && fread(read.get(), 1, size, file) != size_t(size)) exit(3);
  return read;
}

Described described(FILE* file) {
  Described one;
  const long long length = number(file);
  one.kernel.assign(reinterpret_cast<char*>(bytes(file, length).get()), length);
  one.blocks = number(file), one.threads = number(file), one.shared_bytes = number(file);
  for (long long left = number(file); left > 0; --left) {
    Argument argument = {number(file), number(file), {}};
    if (argument.kind == 2) {
      for (long long i = 0; i < argument.value; ++i) argument.table.push_back(number(file));
    }
    one.arguments.push_back(argument);
  }
  return one;
}

// The arguments of one grid as the launch takes them.
struct Held {
  std::vector<void*> values, addresses;
  std::vector<std::vector<void*>> tables;

  Held(const Described& of, const std::vector<Buffer>& buffers) {
    for (const Argument& one : of.arguments) {
      if (one.kind == 0) values.push_back(buffers[one.value].now.get());
      if (one.kind == 1) values.push_back(reinterpret_cast<void*>(one.value));
      if (one.kind == 2) {
        std::vector<void*> table;
        for (long long buffer : one.table) table.push_back(buffers[buffer].now.get());
        tables.push_back(table);
        values.push_back(nullptr);
      }
    }
    size_t next = 0;
    for (size_t i = 0; i < values.size(); ++i) {
      if (of.arguments[i].kind == 2) values[i] = tables[next++].data();
    }
    for (void*& value : values) addresses.push_back(&value);
  }
};

void run(const std::vector<Described>& together, const std::vector<Buffer>& buffers, const sim::Config& config,
         sim::Report& report) {
  std::vector<Held> held;
  std::vector<NamedGrid> grids;
  for (const Described& one : together) held.emplace_back(one, buffers);
  for (size_t i = 0; i < together.size(); ++i) {
    const Described& one = together[i];
    for (size_t a = 0; a < held[i].values.size(); ++a) held[i].addresses[a] = &held[i].values[a];
    grids.push_back({one.kernel.c_str(), int(one.blocks), int(one.threads), int(one.shared_bytes),
                     held[i].addresses.data()});
  }
  sim_launch(grids.data(), int(grids.size()), &config, &report);
}

}  // namespace

int main(int count, char** words) {
  FILE* in = fopen(words[1], "rb");
  FILE* out = fopen(words[2], "wb");
  if (!in || !out) return 3;
  std::vector<Buffer> buffers(number(in));
  for (Buffer& one : buffers) {
    one.size = number(in);
    one.initial = bytes(in, one.size);
  }
  std::vector<std::vector<Described>> steps(number(in));
  for (auto& step : steps) {
    for (long long left = number(in); left > 0; --left) step.push_back(described(in));
  }
  for (int i = 3; i < count; ++i) {
    sim::Config config = {};
    sim::Report report = {};
    sscanf(words[i], "%d,%d,%d,%llu,%d", &config.order, &config.late, &config.multiprocessors, &config.seed,
           &config.mutant);
    for (Buffer& one : buffers) {
      one.now.reset(new unsigned char[one.size]);
      memcpy(one.now.get(), one.initial.get(), one.size);
    }
    for (const auto& step : steps) {
      if (!report.failed) run(step, buffers, config, report);
    }
    fwrite(&report, sizeof report, 1, out);
    for (const Buffer& one : buffers) fwrite(one.now.get(), 1, one.size, out);
  }
  fclose(out);
  return 0;
}
