#include "kernels/adamw8/adamw8.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <cstring>
#include <limits>

#include "kernels/adamw8/adamw8_step.h"
#include "kernels/device.h"
#include "kernels/nf4/nf4.h"

namespace graft::kernels {
namespace {

constexpr int64_t kPieceBlocks = 32;  // of one task of a thread

ByteMap byte_map(const at::Tensor& values) {
  ByteMap map{};
  std::copy_n(values.const_data_ptr<float>(), 256, map.values);
  for (int i = 0; i < 255; ++i) map.thresholds[i] = (map.values[i] + map.values[i + 1]) / 2;
  return map;
}

const MomentMaps& moment_maps() {
  static const MomentMaps maps{byte_map(dynamic_map()), byte_map(unsigned_dynamic_map())};
  return maps;
}

CodeTable code_table(const ByteMap& map) {
  const auto number = [](uint32_t key) {
    const uint32_t bits = key << 16;
    float value;
    std::memcpy(&value, &bits, sizeof(value));
    return value;
  };
  CodeTable table{};
  for (uint32_t key = 0; key < CodeTable::kKeys; ++key) {
    // Magnitudes [low, high): x in [low, high), and with a sign in (-high, -low].
    const float low = key == 0 ? 0 : number(CodeTable::kLowest + key);
    const float high = number(CodeTable::kLowest + key + 1);
    const float* end = map.thresholds + 255;
    const float* from = std::lower_bound(map.thresholds, end, low);
    const float* from_minus = std::upper_bound(map.thresholds, end, -high);
    const float* to = std::lower_bound(map.thresholds, end, high);
    const float* to_minus = std::lower_bound(map.thresholds, end, -low);
    GRAFT_ASSERT(to - from <= 1 && to_minus - from_minus <= 1, "midpoints too near at ", low);
    const auto fill = [&](uint32_t place, const float* first, const float* last) {
      table.below[place] = static_cast<uint8_t>(first - map.thresholds);
      table.midpoint[place] = last > first ? *first : std::numeric_limits<float>::infinity();
    };
    fill(key, from, to), fill(CodeTable::kKeys + key, from_minus, to_minus);
  }
  return table;
}

const cpu::MomentTables& moment_tables() {
  static const cpu::MomentTables tables{code_table(moment_maps().first),
                                        code_table(moment_maps().second)};
  return tables;
}

void check(const at::Tensor& tensor, at::ScalarType type, int64_t size, const at::Tensor& on,
           const char* what) {
  GRAFT_CHECK(tensor.scalar_type() == type && tensor.is_contiguous() && tensor.numel() == size &&
                  tensor.device() == on.device(),
              "adamw_8bit: ", what, " must be ", size, " contiguous ", type, " on ", on.device(),
              ", got ", tensor.scalar_type(), tensor.sizes(), " on ", tensor.device());
}

}  // namespace

void adamw_8bit(at::TensorList parameters, at::TensorList gradients,
                const std::vector<EightBitMoment>& first_moments,
                const std::vector<EightBitMoment>& second_moments, int64_t step,
                const AdamWConfig& config) {
  const size_t count = parameters.size();
  GRAFT_CHECK(
      gradients.size() == count && first_moments.size() == count && second_moments.size() == count,
      "adamw_8bit got ", count, " parameters, ", gradients.size(), " gradients, ",
      first_moments.size(), " and ", second_moments.size(), " moments");
  const AdamWStep scalars = adamw_step(config, step);
  std::vector<AdamW8Piece> pieces;
  for (size_t i = 0; i < count; ++i) {
    const at::Tensor& parameter = parameters[i];
    const int64_t size = parameter.numel(), blocks = (size + kAdamW8Block - 1) / kAdamW8Block;
    check(parameter, at::kFloat, size, parameter, "a parameter");
    check(gradients[i], at::kFloat, size, parameter, "a gradient");
    for (const EightBitMoment& moment : {first_moments[i], second_moments[i]}) {
      check(moment.codes, at::kByte, size, parameter, "codes");
      check(moment.absmax, at::kFloat, blocks, parameter, "absmax");
    }
    const AdamW8Piece whole{parameter.mutable_data_ptr<float>(),
                            gradients[i].const_data_ptr<float>(),
                            first_moments[i].codes.mutable_data_ptr<uint8_t>(),
                            first_moments[i].absmax.mutable_data_ptr<float>(),
                            second_moments[i].codes.mutable_data_ptr<uint8_t>(),
                            second_moments[i].absmax.mutable_data_ptr<float>(),
                            size};
    for (int64_t block = 0; block < blocks; block += kPieceBlocks) {
      const int64_t at = block * kAdamW8Block;
      pieces.push_back({whole.parameter + at, whole.gradient + at, whole.first_codes + at,
                        whole.first_absmax + block, whole.second_codes + at,
                        whole.second_absmax + block,
                        std::min(kPieceBlocks * kAdamW8Block, size - at)});
    }
  }
  if (pieces.empty()) return;
  on_device(
      parameters[0],
      [&] {
        at::parallel_for(0, static_cast<int64_t>(pieces.size()), 1,
                         [&](int64_t begin, int64_t end) {
                           for (int64_t i = begin; i < end; ++i)
                             cpu::adamw_8bit(pieces[i], scalars, moment_maps(), moment_tables());
                         });
      },
      GRAFT_CUDA([&](Stream stream) {
        cuda::adamw_8bit(pieces.data(), static_cast<int64_t>(pieces.size()), scalars, moment_maps(),
                         stream);
      }));
}

}  // namespace graft::kernels
