// main() of the tests that mpirun starts: MPI lives as long as the tests do.
#include <gtest/gtest.h>

#include "dist/comm_factory.h"

int main(int argc, char** argv) {
  const graft::dist::MpiSession session(&argc, &argv);
  ::testing::InitGoogleTest(&argc, argv);
  return RUN_ALL_TESTS();
}
