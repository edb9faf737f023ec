// The rules of the house that a compiler does not check: who may include whom, file length, ASCII,
// one list of methods. The table below is the architecture; there is no list of exceptions.
#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <regex>
#include <set>
#include <string>
#include <string_view>
#include <vector>

namespace graft {
namespace {

namespace fs = std::filesystem;

const fs::path kRoot = GRAFT_SOURCE_DIR;
constexpr int kMaxLines = 450;

struct Layer {
  std::string_view folder;
  std::vector<std::string_view>
      may_include;  ///< folders (ending in '/') and single headers, beside its own folder
};

// Every folder may include configs/check.h and configs/log.h. A folder that is not listed may
// include all.
const std::vector<Layer> kLayers = {
    {"kernels", {}},
    {"configs", {}},
    {"dist", {"kernels/", "configs/"}},
    {"data", {"configs/"}},
    {"models", {"kernels/", "configs/", "dist/block_store.h", "data/batch.h"}},
    {"peft", {"models/", "kernels/", "configs/", "data/batch.h"}},
};
constexpr std::array kFolders = {"kernels", "configs", "dist",     "data",
                                 "models",  "peft",    "launcher", "tests"};
constexpr std::array kSharedHeaders = {"configs/check.h", "configs/log.h"};

struct Source {
  std::string path;  ///< from the root, with '/'
  std::vector<std::string> lines;

  std::string folder() const { return path.substr(0, path.find('/')); }
  bool ends_with(std::string_view suffix) const { return path.ends_with(suffix); }
};

std::vector<std::string> read_lines(const fs::path& path) {
  std::ifstream file(path);
  std::vector<std::string> lines;
  for (std::string line; std::getline(file, line);) lines.push_back(line);
  return lines;
}

/// Files under `folder` with one of these extensions; without `folder`, those that lie in the root
/// itself.
std::vector<Source> sources(std::string_view folder, const std::set<std::string>& extensions) {
  std::vector<Source> found;
  const auto add = [&](const fs::directory_entry& entry) {
    if (!entry.is_regular_file() || !extensions.contains(entry.path().extension().string())) return;
    found.push_back({fs::relative(entry.path(), kRoot).generic_string(), read_lines(entry.path())});
  };
  if (folder.empty()) {
    for (const auto& entry : fs::directory_iterator(kRoot)) add(entry);
  } else {
    for (fs::recursive_directory_iterator entry(kRoot / folder), end; entry != end; ++entry) {
      if (entry->path().filename() == "cache") entry.disable_recursion_pending();  // downloads
      add(*entry);
    }
  }
  return found;
}

std::vector<Source> code() {
  std::vector<Source> all;
  for (const char* folder : kFolders) {
    std::ranges::move(sources(folder, {".h", ".cpp", ".cu", ".cuh", ".def"}),
                      std::back_inserter(all));
  }
  return all;
}

struct Include {
  std::string name;
  bool quoted;
  std::string where;  ///< file:line
};

std::vector<Include> includes(const Source& source) {
  static const std::regex kInclude(R"re(^\s*#\s*include\s+(["<])([^">]+)[">])re");
  std::vector<Include> found;
  for (size_t i = 0; i < source.lines.size(); ++i) {
    if (std::smatch match; std::regex_search(source.lines[i], match, kInclude)) {
      found.push_back({match[2], match[1] == "\"", source.path + ":" + std::to_string(i + 1)});
    }
  }
  return found;
}

bool is_libtorch(std::string_view header) {
  constexpr std::array kPrefixes = {"torch/", "ATen/", "c10/"};
  return std::ranges::any_of(kPrefixes, [&](auto prefix) { return header.starts_with(prefix); });
}

bool allowed(const Layer& layer, const std::string& header) {
  if (std::ranges::find(kSharedHeaders, header) != kSharedHeaders.end()) return true;
  if (header.starts_with(std::string(layer.folder) + "/")) return true;
  return std::ranges::any_of(layer.may_include, [&](std::string_view entry) {
    return entry.ends_with('/') ? header.starts_with(entry) : header == entry;
  });
}

std::set<std::string> stems(const std::vector<Source>& files) {
  std::set<std::string> names;
  for (const Source& file : files) names.insert(fs::path(file.path).stem().string());
  return names;
}

TEST(Layering, IncludesStayInsideTheTable) {
  int checked = 0;
  for (const Source& source : code()) {
    const auto layer = std::ranges::find(kLayers, source.folder(), &Layer::folder);
    if (layer == kLayers.end()) continue;
    for (const Include& include : includes(source)) {
      if (!include.quoted) continue;
      ++checked;
      EXPECT_TRUE(allowed(*layer, include.name))
          << include.where << ": " << layer->folder << " may not include " << include.name;
    }
  }
  EXPECT_GT(checked, 0);
}

TEST(Layering, QuotedIncludesAreWrittenFromTheRoot) {
  for (const Source& source : code()) {
    for (const Include& include : includes(source)) {
      if (!include.quoted) continue;
      EXPECT_TRUE(fs::exists(kRoot / include.name))
          << include.where << ": no file " << include.name << " under the root";
    }
  }
}

TEST(Layering, LibTorchStaysOutOfConfigsAndCudaFiles) {
  for (const Source& source : code()) {
    const bool forbidden =
        source.folder() == "configs" || source.ends_with(".cu") || source.ends_with(".cuh");
    for (const Include& include : includes(source)) {
      EXPECT_FALSE(forbidden && is_libtorch(include.name)) << include.where << ": " << include.name;
      EXPECT_NE(include.name, "torch/torch.h")
          << include.where << ": 21 s a file; include what is used";
    }
  }
}

TEST(Sources, AreShort) {
  for (const Source& source : code()) {
    if (source.folder() == "tests") continue;
    EXPECT_LE(source.lines.size(), kMaxLines)
        << source.path << ": split it where it has two subjects";
  }
}

TEST(Sources, AreAscii) {
  for (const Source& source : code()) {
    for (size_t i = 0; i < source.lines.size(); ++i) {
      const bool ascii =
          std::ranges::all_of(source.lines[i], [](unsigned char c) { return c < 128; });
      EXPECT_TRUE(ascii) << source.path << ":" << i + 1;
    }
  }
}

TEST(Methods, ManifestSourcesAndPresetsNameTheSameMethods) {
  static const std::regex kEntry(R"(^METHOD\((\w+))");
  std::set<std::string> manifest;
  for (const std::string& line : read_lines(kRoot / "peft/methods.def")) {
    if (std::smatch match; std::regex_search(line, match, kEntry)) manifest.insert(match[1]);
  }
  EXPECT_FALSE(manifest.empty());
  std::set<std::string> files = stems(sources("peft/methods", {".cpp"}));
  EXPECT_EQ(files.erase("example"), 1U);  // the living skeleton: only the tests register it
  EXPECT_EQ(manifest, files);
  EXPECT_EQ(manifest, stems(sources("configs/methods", {".yaml"})));
}

TEST(Methods, AreShortFiles) {
  constexpr size_t kMostLines = 180, kMostOnAverage = 110;
  const std::vector<Source> files = sources("peft/methods", {".cpp"});
  size_t lines = 0;
  for (const Source& file : files) {
    lines += file.lines.size();
    EXPECT_LE(file.lines.size(), kMostLines)
        << file.path << ": move what others could use out of the method";
  }
  ASSERT_FALSE(files.empty());
  EXPECT_LE(lines, kMostOnAverage * files.size())
      << lines / files.size() << " lines a method on average";
}

// An absolute path outside the system's own folders is somebody's machine.
TEST(Documents, HoldNoPathOfOneMachine) {
  static const std::regex kPath(R"re((^|[\s"'`(=])/(\w+)/)re");
  const std::set<std::string> system = {"bin", "dev", "etc", "opt", "proc",
                                        "sys", "tmp", "usr", "var"};
  std::vector<Source> documents = sources("", {".md"});
  for (const char* folder : {"configs", "cluster", "data", "kernels", "models", "peft", "tests"}) {
    std::ranges::move(sources(folder, {".md", ".yaml", ".sh", ".sbatch", ".py"}),
                      std::back_inserter(documents));
  }
  EXPECT_FALSE(documents.empty());
  for (const Source& document : documents) {
    for (size_t i = 0; i < document.lines.size(); ++i) {
      if (std::smatch match; std::regex_search(document.lines[i], match, kPath)) {
        EXPECT_TRUE(system.contains(match[2]))
            << document.path << ":" << i + 1 << ": " << document.lines[i];
      }
    }
  }
}

}  // namespace
}  // namespace graft
