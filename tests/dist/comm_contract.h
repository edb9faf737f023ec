// What every Comm must do, whatever moves the bytes: called by each rank of a group, checked
// against closed forms. Rank r brings (r + 1) x [0, 1, 2 ...], so every result names who sent what.
#pragma once

#include "dist/comm.h"

namespace graft::dist::testing {

void expect_sums(Comm& comm, at::Device device);
void expect_gathers(Comm& comm, at::Device device);
void expect_exchanges(Comm& comm, at::Device device);
void expect_broadcasts(Comm& comm, at::Device device);
void expect_messages(Comm& comm, at::Device device);
/// Needs at least two ranks.
void expect_out_of_step_gather_throws(Comm& comm, at::Device device);
/// The text helpers; CPU only.
void expect_texts(Comm& comm);

/// All of the above that suit the group's size and device.
void expect_contract(Comm& comm, at::Device device);

/// Equal bits, which at::equal is not for zeros of either sign.
bool same_bits(const at::Tensor& a, const at::Tensor& b);

}  // namespace graft::dist::testing
