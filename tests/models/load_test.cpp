// Loading a base: what is refused, what every storage keeps, and what does not depend on the number
// of ranks.
#include "models/load.h"

#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <mutex>

#include "configs/check.h"
#include "dist/comm_factory.h"
#include "kernels/int8/int8.h"
#include "kernels/nf4/nf4.h"
#include "models/base.h"
#include "models/match.h"
#include "models/names.h"
#include "tests/testing.h"

namespace graft::models {
namespace {

using dist::Comm;
using dist::Pin;
using testing::Base;
using testing::MemorySource;
using testing::tiny_llama;

constexpr const char* kMatrix = "block.0.attn.q.weight";
constexpr const char* kHfMatrix = "model.layers.0.self_attn.q_proj.weight";

std::map<std::string, Tensor> values() {
  return testing::golden_weights(*make_model(tiny_llama()));
}

LoadOptions stored_as(Quantization quantization, bool nested) {
  LoadOptions options;
  options.quantization = quantization;
  options.double_quantization = nested;
  return options;
}

Tensor dense(const Base& base, const std::string& name) {
  const Weight& weight = base.weight(name);
  const Pin pin(*base.store, weight.block());
  return weight.dense().clone();
}

/// Matrices that lie in the file in four bits already, as bitsandbytes quantises them.
class FourBitSource : public MemorySource {
 public:
  FourBitSource() : MemorySource(values()), tensors_(MemorySource::tensors()) {
    for (io::SourceTensor& t : tensors_) {
      if (t.name.find("_proj") != std::string::npos) t.dtype = "nf4";
    }
  }
  const std::vector<io::SourceTensor>& tensors() const override { return tensors_; }
  kernels::FourBitCodes codes(const std::string& name) {
    return kernels::quantize(MemorySource::read(name), kernels::FourBitType::kNf4,
                             kernels::Scales::kNested);
  }
  Tensor read(const std::string& name) override {
    if (find(name)->dtype != "nf4") return MemorySource::read(name);
    Tensor out = at::empty(find(name)->shape);
    kernels::dequantize(codes(name), out);
    return out;
  }
  std::optional<io::FourBit> read_four_bit(const std::string& name) override {
    if (find(name)->dtype != "nf4") return std::nullopt;
    const auto q = codes(name);
    return io::FourBit{"nf4",           find(name)->shape,      q.codes,        q.absmax,
                       q.nested_absmax, kernels::dynamic_map(), q.nested_offset};
  }

 private:
  std::vector<io::SourceTensor> tensors_;
};

TEST(Load, ListsMissingUnknownAndMisshapenTensorsInOneError) {
  auto tensors = values();
  tensors.erase("model.norm.weight");
  tensors["model.layers.7.self_attn.q_proj.weight"] = at::zeros({96, 48});
  tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = at::zeros({8});  // known and not needed
  tensors[kHfMatrix] = at::zeros({96, 47});
  MemorySource source(tensors);
  const auto comm = dist::make_single_comm();
  try {
    const Base base(tiny_llama(), source, *comm);
    FAIL() << "accepted";
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), ExitCode::kData);
    const std::string text = error.what();
    for (const char* part :
         {"not in the file (1)", "model.norm.weight", "not known to this family (1)",
          "model.layers.7.self_attn.q_proj.weight", "other shape (1)", "[96, 47]", "[96, 48]"}) {
      EXPECT_NE(text.find(part), std::string::npos) << part << " in " << text;
    }
    EXPECT_EQ(text.find("inv_freq"), std::string::npos) << text;
  }
}

std::string fingerprint_of(io::TensorSource& source, int world, const LoadOptions& options) {
  std::vector<SourceHash> hashes;
  std::mutex mutex;
  dist::run_virtual_ranks(world, [&](Comm& comm) {
    const Base base(tiny_llama(), source, comm, options);
    const std::lock_guard lock(mutex);
    hashes.insert(hashes.end(), base.hashes.begin(), base.hashes.end());
  });
  EXPECT_EQ(hashes.size(), source.tensors().size());  // every tensor is read once
  return fingerprint(hashes);
}

TEST(Load, FingerprintIsOfTheFileAtAnyWorldSizeAndQuantisation) {
  MemorySource plain(values());
  FourBitSource four_bit;
  for (io::TensorSource* source :
       {static_cast<io::TensorSource*>(&plain), static_cast<io::TensorSource*>(&four_bit)}) {
    const std::string expected = fingerprint_of(*source, 1, testing::unquantised());
    for (const int world : {2, 3})
      EXPECT_EQ(fingerprint_of(*source, world, testing::unquantised()), expected);
    const auto model = make_model(tiny_llama());
    EXPECT_EQ(fingerprint(*source, match_weights(*model, *source)), expected);
    EXPECT_EQ(fingerprint_of(*source, 1, stored_as(Quantization::kNf4, true)), expected);
  }
  for (const Quantization q : {Quantization::kFp4, Quantization::kInt8}) {
    EXPECT_EQ(fingerprint_of(plain, 1, stored_as(q, true)),
              fingerprint_of(plain, 1, testing::unquantised()));
  }
  auto changed = values();
  changed[kHfMatrix] = changed[kHfMatrix].clone();
  changed[kHfMatrix][0][0] += 1;
  MemorySource other(changed);
  EXPECT_NE(fingerprint_of(other, 1, testing::unquantised()),
            fingerprint_of(plain, 1, testing::unquantised()));
}

TEST(Load, ShardsHoldTheBytesOfTheWhole) {
  for (const Quantization q : {Quantization::kNone, Quantization::kNf4, Quantization::kInt8}) {
    std::string expected;
    for (const int world : {1, 2, 3}) {
      dist::run_virtual_ranks(world, [&](Comm& comm) {
        const Base base(tiny_llama(), comm, stored_as(q, true));
        const std::string hash = base.store->hash();
        if (world == 1) expected = hash;
        EXPECT_EQ(hash, expected) << world;
      });
    }
  }
}

TEST(Load, FourBitMatricesAreWhatTheQuantiserMakesOfThem) {
  const auto comm = dist::make_single_comm();
  const Tensor w = values().at(kHfMatrix);
  for (const bool nested : {false, true}) {
    for (const bool nf4 : {false, true}) {
      const Base base(tiny_llama(), *comm,
                      stored_as(nf4 ? Quantization::kNf4 : Quantization::kFp4, nested));
      const Tensor expected = at::empty_like(w);
      kernels::dequantize(
          kernels::quantize(w, nf4 ? kernels::FourBitType::kNf4 : kernels::FourBitType::kFp4,
                            nested ? kernels::Scales::kNested : kernels::Scales::kPlain),
          expected);
      EXPECT_TRUE(at::equal(dense(base, kMatrix), expected));
      EXPECT_FALSE(at::equal(expected, w));
      EXPECT_TRUE(at::equal(dense(base, "embed.weight"), values().at("model.embed_tokens.weight")));
      EXPECT_TRUE(at::isfinite(base.logits(testing::batch_of(testing::random_tokens(1, 8, 128, 1))))
                      .all()
                      .item<bool>());
    }
  }
}

TEST(Load, Int8MatricesAreWhatTheQuantiserMakesOfThem) {
  const auto comm = dist::make_single_comm();
  const Tensor w = values().at(kHfMatrix), expected = at::empty_like(w);
  kernels::dequantize_int8(kernels::quantize_int8(w), expected);
  const Base base(tiny_llama(), *comm, stored_as(Quantization::kInt8, false));
  EXPECT_TRUE(at::equal(dense(base, kMatrix), expected));
}

TEST(Load, KeepsFourBitCodesBitForBit) {
  const auto comm = dist::make_single_comm();
  FourBitSource source;
  const Base base(tiny_llama(), source, *comm, stored_as(Quantization::kNf4, true));
  const Weight& weight = base.weight(kMatrix);
  const Pin pin(*base.store, weight.block());
  const auto q = source.codes(kHfMatrix);
  EXPECT_TRUE(
      at::equal(base.store->bytes(weight.block(), weight.offset(), q.codes.numel()), q.codes));
  EXPECT_TRUE(at::equal(weight.dense(), source.read(kHfMatrix)));
}

/// What loading a source refuses with, and the words of it; kDone if it loads.
std::pair<ExitCode, std::string> refusal_of(io::TensorSource& source, const LoadOptions& options,
                                            bool tied_head = false) {
  const auto comm = dist::make_single_comm();
  try {
    const Base base(tiny_llama(2, tied_head), source, *comm, options);
  } catch (const Error& error) {
    return {error.code(), error.what()};
  }
  return {ExitCode::kDone, ""};
}

TEST(Load, NeverQuantisesAgainWhatTheFileHoldsInFourBits) {
  FourBitSource source;
  for (const LoadOptions& options :
       {stored_as(Quantization::kNf4, false), stored_as(Quantization::kFp4, true),
        stored_as(Quantization::kInt8, true)}) {
    const auto [code, text] = refusal_of(source, options);
    EXPECT_EQ(code, ExitCode::kUsage);
    EXPECT_NE(text.find("set model.quantization: nf4 and model.double_quantization: true"),
              std::string::npos)
        << text;
  }
}

TEST(Load, RefusesTensorsThatAreNotFloatingPoint) {
  for (const char* dtype : {"C64", "I8", "I64", "BOOL", "F8_E4M3"}) {
    class Relabelled : public MemorySource {
     public:
      explicit Relabelled(const char* dtype)
          : MemorySource(values()), all_(MemorySource::tensors()) {
        all_.front().dtype = dtype;
      }
      const std::vector<io::SourceTensor>& tensors() const override { return all_; }

     private:
      std::vector<io::SourceTensor> all_;
    } source(dtype);
    const auto [code, text] = refusal_of(source, stored_as(Quantization::kNf4, true));
    EXPECT_EQ(code, ExitCode::kData);
    EXPECT_NE(text.find(" is " + std::string(dtype)), std::string::npos) << text;
  }
}

TEST(Load, NamesTheMatrixThatCannotBeQuantised) {
  auto tensors = values();
  tensors[kHfMatrix] = at::full({96, 48}, 3e38F);
  MemorySource source(tensors);
  const auto [code, text] = refusal_of(source, stored_as(Quantization::kNf4, true));
  EXPECT_EQ(code, ExitCode::kData);
  EXPECT_NE(text.find(kHfMatrix), std::string::npos) << text;
}

TEST(Load, DoubleWeightsAreQuantisedAsFloats) {
  const auto comm = dist::make_single_comm();
  auto tensors = values();
  for (auto& [name, value] : tensors) value = value.to(at::kDouble);
  MemorySource source(tensors);
  const LoadOptions options = stored_as(Quantization::kNf4, true);
  EXPECT_EQ(Base(tiny_llama(), source, *comm, options).store->hash(),
            Base(tiny_llama(), *comm, options).store->hash());
}

TEST(Load, SixteenBitsStaySixteenBits) {
  const auto comm = dist::make_single_comm();
  auto tensors = values();
  for (auto& [name, value] : tensors)
    value = value.to(name.find("mlp") != std::string::npos ? at::kHalf : at::kBFloat16);
  MemorySource source(tensors);
  const Base half(tiny_llama(), source, *comm), whole(tiny_llama(), *comm);
  EXPECT_TRUE(at::equal(dense(half, kMatrix), tensors.at(kHfMatrix).to(at::kFloat)));
  EXPECT_EQ(half.weight(kMatrix).payload_bytes() * 2, whole.weight(kMatrix).payload_bytes());
  const std::string up = "block.1.mlp.up.weight";
  EXPECT_TRUE(
      at::equal(dense(half, up), tensors.at("model.layers.1.mlp.up_proj.weight").to(at::kFloat)));
}

TEST(Load, PreparedWeightsAreWhatIsStored) {
  const auto comm = dist::make_single_comm();
  LoadOptions options = testing::unquantised();
  std::vector<std::string> shown;
  options.prepare_weight = [&](const std::string& name, const Tensor& w) {
    return shown.push_back(name), w * 2;
  };
  const Base base(tiny_llama(), *comm, options);
  EXPECT_EQ(shown.size(), 14U);  // seven matrices a layer; neither tables nor norms
  EXPECT_TRUE(at::equal(dense(base, kMatrix), values().at(kHfMatrix) * 2));
}

TEST(Load, GgufNamesAndOrderGiveTheSameModel) {
  const auto comm = dist::make_single_comm();
  for (const char* type : {"llama", "qwen2"}) {
    nlohmann::json config = tiny_llama();
    config["model_type"] = type;
    const auto model = make_model(config);
    std::map<std::string, Tensor> renamed;
    for (const auto& [hf, value] : testing::golden_weights(*model)) {
      const auto found = model->names().to_gguf(*model->names().from_hf(hf));
      const bool permuted = found->transform != Transform::kIdentity;
      EXPECT_EQ(permuted, std::string(type) == "llama" &&
                              (hf.ends_with("q_proj.weight") || hf.ends_with("k_proj.weight")));
      renamed[found->name] = permuted ? rope_rows_to_gguf(value, 16) : value;
      EXPECT_EQ(at::equal(renamed[found->name], value), !permuted) << hf;
    }
    MemorySource source(renamed);
    const data::Batch batch = testing::batch_of(testing::random_tokens(1, 8, 128, 1));
    EXPECT_TRUE(
        at::equal(Base(config, source, *comm).logits(batch), Base(config, *comm).logits(batch)))
        << type;
  }
}

TEST(Load, RandomWeightsFollowFromSeedAndName) {
  const auto model = make_model(tiny_llama());
  const auto source = random_source(*model, 1), again = random_source(*model, 1),
             other = random_source(*model, 2);
  const std::string key = "model.layers.1.mlp.up_proj.weight";
  again->read(kHfMatrix);  // what was read before does not matter
  EXPECT_TRUE(at::equal(source->read(key), again->read(key)));
  EXPECT_FALSE(at::equal(source->read(key), other->read(key)));
  EXPECT_NEAR(source->read("model.embed_tokens.weight").std().item<double>(), 0.02, 0.001);
  EXPECT_TRUE(at::equal(source->read("model.norm.weight"), at::ones({48})));
}

}  // namespace
}  // namespace graft::models
