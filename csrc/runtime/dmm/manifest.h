// manifest.json of an export (dmm_fast.export): what its files take and give. Believed only after it is checked.
#pragma once

#include <cstdint>
#include <map>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "dmm/json.h"

namespace dmm {

/// One dimension of a tensor: a size, or the name of one that may vary.
struct Extent {
  int64_t size = -1;  // -1 where it may vary
  std::string name;
};

struct TensorSpec {
  std::string name, dtype;  // dtype "bool", "uint8", "int32", "int64" or "float32"
  std::vector<Extent> shape;
};

/// One function of an export.
struct Function {
  std::string file;  // a plain name in the export's folder
  uint64_t bytes = 0;
  std::string sha256;
  std::vector<TensorSpec> inputs, outputs;
};

struct Manifest {
  std::string folder, kind, torch, device, weights;
  Json config;
  std::vector<std::string> ops;
  std::map<std::string, Function> files;
  std::set<std::string> masks;  // how proposals' masks may come, see Proposals: "full", "runs", "soft"
  std::map<std::string, std::pair<int64_t, int64_t>> dynamic;  // smallest and largest value of what may vary

  /// Throws Error where folder/manifest.json is missing, damaged, of another format, or lists files that are not those in the
  /// folder (by size and SHA-256). A checksum tells damage, not malice: an export is a program.
  static Manifest read(const std::string& folder);

  std::string path(const Function& function) const { return folder + "/" + function.file; }
};

}  // namespace dmm
