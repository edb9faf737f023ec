#include "data/shard_file.h"

#include <sys/stat.h>

#include <algorithm>
#include <sstream>
#include <string_view>
#include <tuple>
#include <type_traits>

#include "configs/check.h"
#include "data/scan.h"
#include "data/trial.h"

namespace graft::data {
namespace {

constexpr int64_t kSchema = 1;
constexpr hsize_t kMaxChunkBytes = hsize_t{64} << 20;  // what a file may make us allocate at once
constexpr hsize_t kDeflateLimit = 1032;                // no deflate stream expands further
constexpr hsize_t kMaxLabels = 1 << 20;
constexpr int64_t kMaskLimit = 2;  // a mask is 0 or 1
constexpr int64_t kZeroRun = 4;    // no document is so many tokens 0 and nothing else

constexpr unsigned kMaxStringSeconds = 1;  // a million strings take less

/// A number, string or array in the file, as libhdf5 sees it: an attribute or a dataset.
struct Stored {
  const std::string& path;
  std::string name;
  Hdf5Handle object, type, space;
  bool is_attribute = false;

  hsize_t size() const { return static_cast<hsize_t>(H5Sget_simple_extent_npoints(space.get())); }
  void read(hid_t memory_type, void* out) const {
    if (is_attribute) {
      checked(H5Aread(object.get(), memory_type, out), path, "read '" + name + "'");
    } else {
      const std::string failure = DatasetReader(object.get(), memory_type).read(0, size(), out);
      GRAFT_CHECK(failure.empty(), ExitCode::kData, path, ": cannot read '", name, "': ", failure);
    }
  }
};

Stored open_attribute(hid_t file, const std::string& path, const std::string& name) {
  const bool found = checked(H5Aexists(file, name.c_str()), path, "look up attributes") > 0;
  GRAFT_CHECK(found, ExitCode::kData, path, ": attribute '", name,
              "' is missing; is this a Graft shard? (graft prepare makes them)");
  Stored stored{path, name, {}, {}, {}, true};
  const std::string action = "open attribute '" + name + "'";
  stored.object = {checked(H5Aopen(file, name.c_str(), H5P_DEFAULT), path, action), H5Aclose};
  stored.type = {checked(H5Aget_type(stored.object.get()), path, action), H5Tclose};
  stored.space = {checked(H5Aget_space(stored.object.get()), path, action), H5Sclose};
  GRAFT_CHECK(stored.size() == 1, ExitCode::kData, path, ": attribute '", name,
              "' must be one value, it has ", stored.size());
  return stored;
}

int64_t read_integer_attribute(hid_t file, const std::string& path, const std::string& name) {
  const Stored stored = open_attribute(file, path, name);
  GRAFT_CHECK(H5Tget_class(stored.type.get()) == H5T_INTEGER, ExitCode::kData, path,
              ": attribute '", name, "' must be an integer");
  int64_t value = 0;
  stored.read(H5T_NATIVE_INT64, &value);
  return value;
}

/// Strings of variable length (h5py's) lie on a heap without checksums, and libhdf5 believes every
/// number in it: damage kills the process, at once or later. So a child reads them.
std::vector<std::string> read_variable_strings(const Stored& stored) {
  std::string death;
  const std::string joined = in_trial(
      kMaxStringSeconds,
      [&] {
        std::vector<char*> pointers(stored.size(), nullptr);
        stored.read(stored.type.get(), pointers.data());
        std::string joined;  // with a NUL after each
        for (const char* text : pointers) joined += std::string(text ? text : "") + '\0';
        return joined;
      },
      death);
  GRAFT_CHECK(death.empty(), ExitCode::kData, stored.path, ": '", stored.name,
              "' cannot be read: HDF5 fails on its strings of variable length (", death,
              "): the file is damaged; write it again, with strings of fixed length as graft ",
              "prepare does");
  std::vector<std::string> strings(stored.size());
  std::istringstream from(joined);
  for (std::string& text : strings) std::getline(from, text, '\0');
  return strings;
}

/// Strings of fixed length (ours) or variable length (h5py's).
std::vector<std::string> read_strings(const Stored& stored) {
  GRAFT_CHECK(H5Tget_class(stored.type.get()) == H5T_STRING, ExitCode::kData, stored.path, ": '",
              stored.name, "' must hold text");
  if (checked(H5Tis_variable_str(stored.type.get()), stored.path, "read a type") > 0)
    return read_variable_strings(stored);
  std::vector<std::string> strings(stored.size());
  const size_t width = H5Tget_size(stored.type.get());
  GRAFT_CHECK(width <= kMaxChunkBytes / std::max<size_t>(strings.size(), 1), ExitCode::kData,
              stored.path, ": '", stored.name, "' has strings of ", width, " bytes");
  std::string bytes(width * strings.size(), '\0');
  stored.read(stored.type.get(), bytes.data());
  for (size_t i = 0; i < strings.size(); ++i)
    strings[i] = bytes.substr(i * width, width).c_str();  // cut at the first NUL
  return strings;
}

/// Filters: only those that we undo ourselves.
void check_filters(hid_t properties, const Stored& stored, hsize_t width, hsize_t& expansion) {
  const int num_filters = checked(H5Pget_nfilters(properties), stored.path, "read filters");
  GRAFT_CHECK(num_filters == 0 || H5Tis_variable_str(stored.type.get()) == 0, ExitCode::kData,
              stored.path, ": '", stored.name, "' has filters on strings of variable length; ",
              "write it without filters or with strings of fixed length");
  for (int i = 0; i < num_filters; ++i) {
    unsigned flags = 0, config = 0;
    size_t num_values = 0;
    const auto filter =
        H5Pget_filter2(properties, i, &flags, &num_values, nullptr, 0, nullptr, &config);
    GRAFT_CHECK(filter == H5Z_FILTER_FLETCHER32 || filter == H5Z_FILTER_SHUFFLE ||
                    filter == H5Z_FILTER_DEFLATE,
                ExitCode::kData, stored.path, ": '", stored.name, "' uses HDF5 filter ", filter,
                "; only fletcher32, shuffle and deflate are accepted");
    if (filter != H5Z_FILTER_DEFLATE) continue;
    GRAFT_CHECK(expansion == 1, ExitCode::kData, stored.path, ": '", stored.name,
                "' is compressed twice");
    expansion = kDeflateLimit;
  }
  hsize_t chunk = 0;
  const bool one_dimension = H5Pget_chunk(properties, 1, &chunk) == 1;
  GRAFT_CHECK(one_dimension && chunk > 0 && chunk <= kMaxChunkBytes / width, ExitCode::kData,
              stored.path, ": '", stored.name, "' has chunks of ", chunk, " elements; at most ",
              kMaxChunkBytes, " bytes are accepted");
}

/// How the bytes are stored: in this file, in a way we know, and all of them (memory is taken by
/// this size).
void check_storage(const Stored& stored) {
  const hid_t dataset = stored.object.get();
  const Hdf5Handle properties(checked(H5Dget_create_plist(dataset), stored.path, "read storage"),
                              H5Pclose);
  const H5D_layout_t layout = H5Pget_layout(properties.get());
  GRAFT_CHECK((layout == H5D_COMPACT || layout == H5D_CONTIGUOUS || layout == H5D_CHUNKED) &&
                  H5Pget_external_count(properties.get()) == 0,
              ExitCode::kData, stored.path, ": '", stored.name,
              "' is stored outside this file (external or virtual); copy it into one file");
  const hsize_t width = H5Tget_size(stored.type.get());
  GRAFT_CHECK(width > 0, ExitCode::kData, stored.path, ": '", stored.name, "' has no element size");
  hsize_t expansion = 1;
  if (layout == H5D_CHUNKED) check_filters(properties.get(), stored, width, expansion);
  const Hdf5Handle file(checked(H5Iget_file_id(dataset), stored.path, "find the file"), H5Fclose);
  hsize_t file_bytes = 0;
  checked(H5Fget_filesize(file.get(), &file_bytes), stored.path, "read the file's size");
  const hsize_t stored_bytes = std::min(H5Dget_storage_size(dataset), file_bytes);
  GRAFT_CHECK(stored.size() <= stored_bytes / width * expansion, ExitCode::kData, stored.path,
              ": '", stored.name, "' claims ", stored.size(), " elements but stores ", stored_bytes,
              " bytes; the file is incomplete");
}

Stored open_dataset(hid_t file, const std::string& path, const std::string& name) {
  const bool found = checked(H5Lexists(file, name.c_str(), H5P_DEFAULT), path, "look up names") > 0;
  GRAFT_CHECK(found, ExitCode::kData, path, ": dataset '", name, "' is missing");
  Stored stored{path, name, {}, {}, {}, false};
  const std::string action = "open '" + name + "'";
  stored.object = {checked(H5Dopen2(file, name.c_str(), H5P_DEFAULT), path, action), H5Dclose};
  stored.type = {checked(H5Dget_type(stored.object.get()), path, action), H5Tclose};
  stored.space = {checked(H5Dget_space(stored.object.get()), path, action), H5Sclose};
  GRAFT_CHECK(H5Sget_simple_extent_ndims(stored.space.get()) == 1, ExitCode::kData, path, ": '",
              name, "' must have one dimension");
  check_storage(stored);
  return stored;
}

/// The dataset, if it holds exactly this kind of integer (either byte order).
template <class Number>
Stored open_numbers(hid_t file, const std::string& path, const std::string& name) {
  Stored stored = open_dataset(file, path, name);
  const H5T_sign_t sign = std::is_signed_v<Number> ? H5T_SGN_2 : H5T_SGN_NONE;
  GRAFT_CHECK(H5Tget_class(stored.type.get()) == H5T_INTEGER &&
                  H5Tget_size(stored.type.get()) == sizeof(Number) &&
                  H5Tget_precision(stored.type.get()) == 8 * sizeof(Number) &&
                  H5Tget_sign(stored.type.get()) == sign,
              ExitCode::kData, path, ": '", name, "' must be ",
              std::is_signed_v<Number> ? "int" : "uint", 8 * sizeof(Number));
  return stored;
}

template <class Number>
std::vector<Number> read_numbers(hid_t file, const std::string& path, const std::string& name) {
  const Stored stored = open_numbers<Number>(file, path, name);
  std::vector<Number> numbers(stored.size());
  if (!numbers.empty()) stored.read(native_type<Number>(), numbers.data());
  return numbers;
}

void check_offsets(const std::vector<uint64_t>& offsets, uint64_t end, const std::string& path,
                   std::string_view name) {
  const bool ok = !offsets.empty() && offsets.front() == 0 && offsets.back() == end &&
                  std::is_sorted(offsets.begin(), offsets.end());
  GRAFT_CHECK(ok, ExitCode::kData, path, ": '", name, "' must rise from 0 to ", end,
              ", the number of tokens");
}

/// Only hard links to names of the format: nothing that leads elsewhere, nothing we would silently
/// ignore.
void check_members(hid_t file, const std::string& path) {
  static constexpr std::string_view kKnown[] = {"tokens",        "offsets",     "loss_mask",
                                                "label",         "labels",      "label_tokens",
                                                "label_offsets", "token_labels"};
  H5G_info_t group;
  checked(H5Gget_info(file, &group), path, "list the file");
  for (hsize_t i = 0; i < group.nlinks; ++i) {
    char name[64] = "";
    checked(H5Lget_name_by_idx(file, ".", H5_INDEX_NAME, H5_ITER_INC, i, name, sizeof name,
                               H5P_DEFAULT),
            path, "list the file");
    GRAFT_CHECK(std::find(std::begin(kKnown), std::end(kKnown), name) != std::end(kKnown),
                ExitCode::kData, path, ": '", name, "' is not part of the tokens format");
    H5L_info_t link;
    checked(H5Lget_info(file, name, &link, H5P_DEFAULT), path, "list the file");
    GRAFT_CHECK(link.type == H5L_TYPE_HARD, ExitCode::kData, path, ": '", name,
                "' is a link to another place; copy the data into this file");
  }
}

Hdf5Handle open_file(const std::string& path) {
  struct stat status;
  GRAFT_CHECK(::stat(path.c_str(), &status) == 0, ExitCode::kData, path,
              ": no such file, or it cannot be reached");
  GRAFT_CHECK(S_ISREG(status.st_mode), ExitCode::kData, path, ": not a regular file");
  const Hdf5Handle access(checked(H5Pcreate(H5P_FILE_ACCESS), path, "prepare"), H5Pclose);
  // Shards never change once named, and parallel file systems are often mounted without locks.
  checked(H5Pset_file_locking(access.get(), false, true), path, "prepare");
  // Without its cache libhdf5 reads elements at their place, whatever length a chunk claims.
  checked(H5Pset_cache(access.get(), 0, 0, 0, 0), path, "prepare");
  return {checked(H5Fopen(path.c_str(), H5F_ACC_RDONLY, access.get()), path, "open as HDF5"),
          H5Fclose};
}

int descriptor_of(hid_t file, const std::string& path) {
  void* descriptor = nullptr;
  checked(H5Fget_vfd_handle(file, H5P_DEFAULT, &descriptor), path, "find the open file");
  return *static_cast<int*>(descriptor);
}

/// Size and modification time, in bytes and nanoseconds, of the very file that is open.
std::pair<int64_t, int64_t> file_state(int descriptor, const std::string& path) {
  struct stat status;
  GRAFT_CHECK(::fstat(descriptor, &status) == 0, ExitCode::kData, path,
              ": cannot read the file's state");
  return {status.st_size, status.st_mtim.tv_sec * 1'000'000'000 + status.st_mtim.tv_nsec};
}

bool has(hid_t file, const std::string& path, const char* name) {
  return checked(H5Lexists(file, name, H5P_DEFAULT), path, "look up names") > 0;
}

}  // namespace

std::span<const uint32_t> ShardLabels::tokens_of(int32_t label) const {
  if (offsets.empty()) return {};
  const auto at = static_cast<size_t>(label);
  return std::span(tokens).subspan(offsets[at], offsets[at + 1] - offsets[at]);
}

TokenShard::TokenShard(const std::string& path) : path_(path) {
  Hdf5Lock lock;
  file_ = open_file(path);
  const hid_t file = file_.get();
  descriptor_ = descriptor_of(file, path);
  std::tie(file_bytes_, modified_ns_) = file_state(descriptor_, path);
  const int64_t schema = read_integer_attribute(file, path, "graft_schema");
  GRAFT_CHECK(schema == kSchema, ExitCode::kData, path, ": graft_schema is ", schema,
              ", this program reads ", kSchema);
  const std::string kind = read_strings(open_attribute(file, path, "kind")).front();
  GRAFT_CHECK(kind == "tokens", ExitCode::kData, path, ": kind is '", kind, "', expected 'tokens'");
  check_members(file, path);
  created_by_ = read_strings(open_attribute(file, path, "created_by")).front();
  tokenizer_sha256_ = read_strings(open_attribute(file, path, "tokenizer_sha256")).front();
  vocab_size_ = read_integer_attribute(file, path, "vocab_size");
  GRAFT_CHECK(vocab_size_ > 0, ExitCode::kData, path, ": vocab_size is ", vocab_size_);

  Stored tokens = open_numbers<uint32_t>(file, path, "tokens");
  Stored loss_mask = open_numbers<uint8_t>(file, path, "loss_mask");
  GRAFT_CHECK(tokens.size() == loss_mask.size(), ExitCode::kData, path, ": 'tokens' has ",
              tokens.size(), " elements, 'loss_mask' ", loss_mask.size());
  offsets_ = read_numbers<uint64_t>(file, path, "offsets");
  check_offsets(offsets_, tokens.size(), path, "offsets");
  const int64_t claimed = read_integer_attribute(file, path, "num_samples");
  GRAFT_CHECK(claimed == num_samples(), ExitCode::kData, path, ": num_samples is ", claimed,
              ", 'offsets' has ", num_samples(), " samples");
  tokens_ = {std::move(tokens.object), vocab_size_, descriptor_};
  loss_mask_ = {std::move(loss_mask.object), kMaskLimit, descriptor_};
  const bool of_samples = has(file, path, "label"), of_tokens = has(file, path, "token_labels");
  GRAFT_CHECK(!(of_samples && of_tokens), ExitCode::kData, path,
              ": has 'label' and 'token_labels': labels are of samples or of tokens");
  if (!of_samples && !of_tokens) return;
  read_label_names();
  if (of_samples) {
    read_sample_labels();
    return;
  }
  Stored labels = open_numbers<uint32_t>(file, path, "token_labels");
  GRAFT_CHECK(static_cast<int64_t>(labels.size()) == num_tokens(), ExitCode::kData, path,
              ": 'tokens' has ", num_tokens(), " elements, 'token_labels' ", labels.size());
  token_labels_ = {std::move(labels.object), static_cast<int64_t>(labels_->names.size()),
                   descriptor_};
}

void TokenShard::read_label_names() {
  const Stored names = open_dataset(file_.get(), path_, "labels");
  GRAFT_CHECK(names.size() <= kMaxLabels, ExitCode::kData, path_, ": ", names.size(), " labels");
  labels_.emplace().names = read_strings(names);
}

void TokenShard::read_sample_labels() {
  const hid_t file = file_.get();
  ShardLabels& labels = *labels_;
  labels.of_sample = read_numbers<int32_t>(file, path_, "label");
  GRAFT_CHECK(static_cast<int64_t>(labels.of_sample.size()) == num_samples(), ExitCode::kData,
              path_, ": 'label' must have one element a sample, ", num_samples(), ", it has ",
              labels.of_sample.size());
  for (size_t row = 0; row < labels.of_sample.size(); ++row) {
    const int32_t label = labels.of_sample[row];
    GRAFT_CHECK(label >= 0 && label < static_cast<int64_t>(labels.names.size()), ExitCode::kData,
                path_, ": row ", row, " has label ", label, " of ", labels.names.size());
  }
  if (!has(file, path_, "label_tokens") && !has(file, path_, "label_offsets")) return;
  labels.tokens = read_numbers<uint32_t>(file, path_, "label_tokens");
  labels.offsets = read_numbers<uint64_t>(file, path_, "label_offsets");
  check_offsets(labels.offsets, labels.tokens.size(), path_, "label_offsets");
  GRAFT_CHECK(all_below(labels.tokens, vocab_size_), ExitCode::kData, path_,
              ": 'label_tokens' holds tokens that are not below vocab_size ", vocab_size_);
  GRAFT_CHECK(labels.offsets.size() == labels.names.size() + 1, ExitCode::kData, path_,
              ": 'label_offsets' must have one more than the ", labels.names.size(),
              " of 'labels'");
}

int64_t TokenShard::row_of(int64_t position) const {
  return std::upper_bound(offsets_.begin(), offsets_.end(), static_cast<uint64_t>(position)) -
         offsets_.begin() - 1;
}

void TokenShard::read(int64_t begin, std::span<uint32_t> tokens,
                      std::span<uint8_t> loss_mask) const {
  const Run run{begin, static_cast<int64_t>(tokens.size())};
  read(std::span(&run, 1), tokens, loss_mask);
}

void TokenShard::read(std::span<const Run> runs, std::span<uint32_t> tokens,
                      std::span<uint8_t> loss_mask) const {
  Hdf5Lock lock;
  const size_t size = std::min(tokens.size(), loss_mask.size());
  bool sound = true;
  for_each_run(runs, size, [&](int64_t begin, size_t at, size_t length) {
    std::string failure = tokens_.read(begin, tokens.subspan(at, length), sound);
    if (failure.empty()) failure = loss_mask_.read(begin, loss_mask.subspan(at, length), sound);
    GRAFT_CHECK(failure.empty(), ExitCode::kData, path_, ": row ", row_of(begin),
                ": cannot read: ", failure);
  });
  check_unchanged(runs);
  if (sound) return;
  for_each_run(runs, size, [&](int64_t begin, size_t at, size_t length) {
    check_values(begin, tokens.subspan(at, length), loss_mask.subspan(at, length));
  });
}

void TokenShard::read_token_labels(std::span<const Run> runs, std::span<uint32_t> labels) const {
  Hdf5Lock lock;
  bool sound = true;
  for_each_run(runs, labels.size(), [&](int64_t begin, size_t at, size_t length) {
    const std::string failure = token_labels_.read(begin, labels.subspan(at, length), sound);
    GRAFT_CHECK(failure.empty(), ExitCode::kData, path_, ": row ", row_of(begin),
                ": cannot read: ", failure);
  });
  check_unchanged(runs);
  if (sound) return;
  const int64_t count = std::ssize(labels_->names);
  for_each_run(runs, labels.size(), [&](int64_t begin, size_t at, size_t length) {
    const auto part = labels.subspan(at, length);
    const auto bad = std::find_if(part.begin(), part.end(), [&](auto x) { return x >= count; });
    GRAFT_CHECK(bad == part.end(), ExitCode::kData, path_, ": row ",
                row_of(begin + (bad - part.begin())), ": token label ", *bad, " of ", count);
  });
}

/// Calls of(its first token, where it begins in a span of `size`, its length) for each run.
template <class Of>
void TokenShard::for_each_run(std::span<const Run> runs, size_t size, Of of) const {
  size_t at = 0;
  for (const auto& [begin, length] : runs) {
    GRAFT_ASSERT(begin >= 0 && length >= 0 && begin + length <= num_tokens() && at + length <= size,
                 path_, ": read of ", length, " tokens at ", begin);
    of(begin, at, static_cast<size_t>(length));
    at += length;
  }
}

/// Past a new end of the file libhdf5 reads zeros, and the checksum of zeros is zero.
void TokenShard::check_unchanged(std::span<const Run> runs) const {
  GRAFT_CHECK(file_state(descriptor_, path_) == std::pair(file_bytes_, modified_ns_),
              ExitCode::kData, path_, ": row ", row_of(runs.empty() ? 0 : runs.front().begin),
              ": the file was changed while in use; a shard is replaced by a rename");
}

/// Refuses what no chunk speaks for, and names its row.
void TokenShard::check_values(int64_t begin, std::span<const uint32_t> tokens,
                              std::span<const uint8_t> loss_mask) const {
  const int64_t end = begin + static_cast<int64_t>(tokens.size());
  for (int64_t row = row_of(begin), first = begin, last; first < end; ++row, first = last) {
    last = std::min(end, this->begin(row + 1));
    const auto row_tokens = tokens.subspan(first - begin, last - first);
    const auto row_mask = loss_mask.subspan(first - begin, last - first);
    if (!all_below(row_tokens, vocab_size_))
      GRAFT_CHECK(false, ExitCode::kData, path_, ": row ", row, ": token ",
                  *std::find_if(row_tokens.begin(), row_tokens.end(),
                                [&](uint32_t token) { return token >= vocab_size_; }),
                  " is not below vocab_size ", vocab_size_);
    GRAFT_CHECK(all_below(row_mask, kMaskLimit), ExitCode::kData, path_, ": row ", row,
                ": loss_mask is ", int{*std::max_element(row_mask.begin(), row_mask.end())},
                ", must be 0 or 1");
    // A chunk that the disk lost reads as zeros, its checksum too, so the checksum agrees.
    GRAFT_CHECK(last - first < kZeroRun || std::any_of(row_tokens.begin(), row_tokens.end(),
                                                       [](uint32_t token) { return token != 0; }),
                ExitCode::kData, path_, ": row ", row, ": all its ", last - first,
                " tokens are 0: part of the file is lost");
  }
}

}  // namespace graft::data
