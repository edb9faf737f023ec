// models/io/open_source and the folders of SafetensorsSource: shards, links, and indexes that lie.
#include "models/io/open_source.h"

#include "models/io/gguf_writer.h"
#include "models/io/safetensors_source.h"
#include "tests/models/io_testing.h"

namespace graft::models::io {
namespace {

namespace fs = std::filesystem;

const std::string kIndex =
    R"({"weight_map":{"a":"model-1.safetensors","b":"model-2.safetensors","c":"model-1.safetensors"}})";

/// A checkpoint of two shards: a and c, and b.
class Shards : public testing::Test {
 protected:
  Shards() {
    write_shard("model-1.safetensors", {"c", "a"});
    write_shard("model-2.safetensors", {"b"});
    folder_.write("model.safetensors.index.json", kIndex);
  }

  void write_shard(const std::string& file, const std::vector<std::string>& names) {
    NamedTensors tensors;
    for (const std::string& name : names) tensors.emplace_back(name, value(name));
    write_safetensors(folder_.path() + "/" + file, tensors, {});
  }
  static at::Tensor value(const std::string& name) {
    return at::full({2}, static_cast<float>(name[0]));
  }
  void expect_refused_folder(const std::string& words) {
    expect_refused([&] { open_source(folder_.path()); }, words);
  }

  TestFolder folder_;
};

TEST_F(Shards, AreOneSourceSortedByName) {
  const auto source = open_source(folder_.path());
  ASSERT_EQ(source->tensors().size(), 3u);
  for (const std::string name : {"a", "b", "c"}) {
    EXPECT_EQ(source->tensors()[static_cast<size_t>(name[0] - 'a')].name, name);
    EXPECT_EQ(source->find(name)->name, name);
    EXPECT_TRUE(at::equal(source->read(name), value(name)));
  }
  EXPECT_EQ(source->find("aa"), nullptr);
  EXPECT_EQ(source->find("d"), nullptr);
  EXPECT_EQ(source->describe(), folder_.path() + " (safetensors, 2 files)");
}

TEST_F(Shards, MayBeLinksAsInTheHubCache) {
  const TestFolder snapshot;
  for (const char* name :
       {"model-1.safetensors", "model-2.safetensors", "model.safetensors.index.json"}) {
    fs::create_symlink(fs::path(folder_.path()) / name, fs::path(snapshot.path()) / name);
  }
  EXPECT_TRUE(at::equal(open_source(snapshot.path())->read("b"), value("b")));
}

TEST_F(Shards, AreRefusedWhenOneIsMissing) {
  fs::remove(folder_.path() + "/model-2.safetensors");
  expect_refused_folder("model-2.safetensors: cannot open");
}

TEST_F(Shards, AreRefusedWhenTheyLackAListedTensor) {
  write_shard("model-1.safetensors", {"a"});
  expect_refused_folder("tensor 'c' is not in model-1.safetensors");
}

TEST_F(Shards, AreRefusedWhenTheyHoldAnUnlistedTensor) {
  write_shard("model-2.safetensors", {"b", "d"});
  expect_refused_folder("holds tensor 'd', which");
}

TEST_F(Shards, AreRefusedWhenTwoHoldTheSameTensor) {
  write_shard("model-2.safetensors", {"b", "a"});
  expect_refused_folder("puts in model-1.safetensors");
}

TEST_F(Shards, AreRefusedWhenTheIndexNamesATensorTwice) {
  folder_.write("model.safetensors.index.json",
                R"({"weight_map":{"a":"model-1.safetensors","a":"model-2.safetensors"}})");
  expect_refused_folder("duplicate JSON key 'a'");
}

TEST_F(Shards, AreRefusedWhenTheIndexLeavesTheFolder) {
  folder_.write("model.safetensors.index.json", R"({"weight_map":{"a":"../model-1.safetensors"}})");
  expect_refused_folder("in the same folder");
}

TEST_F(Shards, GiveWayToASingleFile) {
  write_safetensors(folder_.path() + "/model.safetensors", {{"whole", at::ones({1})}}, {});
  EXPECT_NE(open_source(folder_.path())->find("whole"), nullptr);
}

TEST(OpenSource, OpensEachFormatByItsPath) {
  const TestFolder folder;
  const std::string path = folder.path() + "/diffusion_pytorch_model";
  write_safetensors(path + ".safetensors", {{"a", at::ones({1})}}, {});
  write_gguf(path + ".gguf", {}, {{"b", at::ones({1})}});
  EXPECT_NE(open_source(folder.path())->find("a"), nullptr);
  EXPECT_NE(open_source(path + ".safetensors")->find("a"), nullptr);
  EXPECT_NE(open_source(path + ".gguf")->find("b"), nullptr);
}

TEST(OpenSource, SaysWhatIsThereInstead) {
  const TestFolder folder;
  expect_refused([&] { open_source(folder.path() + "/none"); }, "no such file or folder");
  expect_refused([&] { open_source(folder.path()); }, "no .safetensors files");
  folder.write("pytorch_model.bin", "");
  expect_refused([&] { open_source(folder.path()); }, "pickle weights (pytorch_model.bin)");
  expect_refused([&] { open_source(folder.path() + "/pytorch_model.bin"); },
                 "expected a Hugging Face folder");
  fs::remove(folder.path() + "/pytorch_model.bin");
  folder.write("model.gguf", "");
  expect_refused([&] { open_source(folder.path()); },
                 "give its path, " + folder.path() + "/model.gguf");
  expect_refused([&] { open_source(folder.path() + "/model.gguf"); }, "passes the end");
  folder.write("other.safetensors", "");
  expect_refused([&] { open_source(folder.path()); }, "no model.safetensors");
}

}  // namespace
}  // namespace graft::models::io
