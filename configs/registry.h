// Registry<Base, Args...>: name -> what it is and how to make one. Filled once at start-up from a
// manifest; a duplicate is a bug of ours, an unknown name a mistake of the user that is answered
// with the nearest one.
#pragma once

#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "configs/check.h"
#include "configs/names.h"

namespace graft::configs {

template <class Base, class... Args>
class Registry {
 public:
  struct Entry {
    std::string name;
    std::string description;  ///< one line
    std::function<std::unique_ptr<Base>(Args...)> make;
  };

  /// @param kind what is registered, for messages: "method", "model"
  explicit Registry(std::string kind) : kind_(std::move(kind)) {}

  void add(Entry entry) {
    GRAFT_ASSERT(find(entry.name) == nullptr, kind_, " '", entry.name,
                 "' is registered twice; registered: ", join(names(), ", "));
    entries_.push_back(std::move(entry));
  }

  /// The entry, or null: for callers that report the mistake with a place of their own.
  const Entry* find(std::string_view name) const {
    for (const Entry& entry : entries_) {
      if (entry.name == name) return &entry;
    }
    return nullptr;
  }

  /// @throws graft::Error for an unknown name, with the nearest and the list
  const Entry& at(std::string_view name) const {
    const Entry* entry = find(name);
    GRAFT_CHECK(entry != nullptr, unknown(name));
    return *entry;
  }

  std::unique_ptr<Base> make(std::string_view name, Args... args) const {
    return at(name).make(std::forward<Args>(args)...);
  }

  /// "unknown method 'lroa'; did you mean 'lora'? (registered: ia3, lora)"
  std::string unknown(std::string_view name) const {
    const std::string close = nearest(name, names());
    return "unknown " + kind_ + " '" + std::string(name) + "'" +
           (close.empty() ? "" : "; did you mean '" + close + "'?") +
           " (registered: " + join(names(), ", ") + ")";
  }

  std::vector<std::string> names() const {
    std::vector<std::string> result;
    for (const Entry& entry : entries_) result.push_back(entry.name);
    return result;
  }

  const std::vector<Entry>& entries() const { return entries_; }  ///< in order of registration

 private:
  std::string kind_;
  std::vector<Entry> entries_;
};

}  // namespace graft::configs
