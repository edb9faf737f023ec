// Registry and the nearest-name help.
#include "configs/registry.h"

#include <gtest/gtest.h>

namespace graft::configs {
namespace {

using Names = std::vector<std::string>;

Registry<std::string, int> digits() {
  Registry<std::string, int> registry("digit");
  registry.add({"one", "the first", [](int n) { return std::make_unique<std::string>(n, '1'); }});
  registry.add({"two", "the second", [](int n) { return std::make_unique<std::string>(n, '2'); }});
  return registry;
}

template <class F>
Error error_of(F&& call) {
  try {
    call();
  } catch (const Error& error) {
    return error;
  }
  return Error(ExitCode::kDone, "nothing was thrown");
}

TEST(Registry, MakesByName) {
  EXPECT_EQ(*digits().make("two", 3), "222");
  EXPECT_EQ(digits().at("one").description, "the first");
  EXPECT_EQ(digits().names(), (Names{"one", "two"}));
  EXPECT_EQ(digits().find("three"), nullptr);
}

TEST(Registry, AnUnknownNameIsAnsweredWithTheNearestAndTheList) {
  const Error error = error_of([] { digits().make("tow", 1); });
  EXPECT_EQ(error.code(), ExitCode::kUsage);
  EXPECT_STREQ(error.what(), "unknown digit 'tow'; did you mean 'two'? (registered: one, two)");
  EXPECT_EQ(digits().unknown("million"), "unknown digit 'million' (registered: one, two)");
}

TEST(Registry, ADuplicateIsABugOfOurs) {
  auto registry = digits();
  const Error error = error_of([&] { registry.add({"one", "again", {}}); });
  EXPECT_EQ(error.code(), ExitCode::kBug);
  EXPECT_NE(std::string(error.what()).find("'one' is registered twice"), std::string::npos);
}

TEST(Names, NearestIsByEditDistanceAndSwapsCountOnce) {
  const Names known = {"lora", "loha", "learning_rate", "r"};
  EXPECT_EQ(nearest("lroa", known), "lora");
  EXPECT_EQ(nearest("learning_rte", known), "learning_rate");
  EXPECT_EQ(nearest("learningrate", known), "learning_rate");
  EXPECT_EQ(nearest("x", known), "");
  EXPECT_EQ(nearest("prefix_tuning", known), "");
  EXPECT_EQ(nearest(std::string(1 << 20, 'l'), known), "");
}

}  // namespace
}  // namespace graft::configs
