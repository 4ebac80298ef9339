//! Pod addresses for the whole cluster: pools, cut into blocks that nodes take.
//!
//! No I/O but through [`store::Store`] (the API server) and [`holdings::Ledger`] (this node's disk); no clock;
//! no thread.
//!
//! # What keeps two nodes from giving the same address
//!
//! Each address of a block is free or one node's, as the block object says, and the object changes only by
//! compare-and-swap on its `resourceVersion`. A node gives only what is its own. That a block is *affine* to a
//! node lets the node take of it first and has its peers route it there as a whole; it is no right to give.
//!
//! A pod's ADD must not wait for the API server. So a node takes addresses ahead of need ([`node::Settings`],
//! low and high) and *keeps them ready*: the block says that they are the node's, and nothing else. Giving one
//! of them to a pod is the node's own affair. These writes must be durable, in this order:
//!
//! 1. the block says that the address is this node's: answered by the API server, or read from it;
//! 2. the [`holdings`] say so, on this node's disk;
//! 3. the node's journal says to which pod it was given; then, and not before, ADD answers.
//!
//! To whom it was given is written into the block *behind*, by the next round: losing that loses no safety.
//! Giving back goes the other way round: out of the journal when the interface is gone, out of the holdings
//! (on disk), then out of the block. So at every instant what the journal gives is in the holdings, and what
//! is in the holdings is in the blocks. Whatever stops half-way leaves more in a block than in the holdings:
//! the next round adopts it, gives it back, or finds it leaked.
//!
//! Borrowing is the same write into another node's block, to an address that nobody has. It has to come
//! before the ADD, so that ADD waits; it comes last, when no block can be had. A node keeps nothing
//! ready by borrowing.
//!
//! # A node that others take for gone
//!
//! Others free what a node had once its Node object is gone for [`collect::Grace::gone`]. It may be alive
//! and cut off. So a node *trusts* its holdings only for [`node::Settings::trust`], which is shorter, after the
//! last round in which the API server answered and its Node was there. After a boot it trusts nothing until
//! such a round, since it may have been off for long. When trust had run out, or the Node object is another one, the
//! round writes each of its blocks (`renewals`), so that a decision taken in its absence meets a changed object.
//! A machine built anew under the same name is another [`holdings::Identity::instance`], to whom the former
//! one's addresses are a gone node's.
//!
//! # Blocks that overlap
//!
//! Two blocks of different size can only come to overlap by a pool that was deleted and made anew with another
//! block size, seen at different times by two nodes. Whoever makes a block, or takes the first address of one,
//! lists all names *after* that write, and gives it up again if another overlaps it. Of two that do this at
//! once at least one sees the other.

pub mod audit;
pub mod block;
pub mod catalogue;
pub mod collect;
pub mod crd;
mod error;
mod gain;
pub mod holdings;
mod maintain;
pub mod memory;
pub mod node;
pub mod object;
mod range;
pub mod selector;
pub mod store;
mod sweep;

pub use error::IpamError;
pub use maintain::{EXHAUSTED, TWICE};
pub use range::Family;
