//! Where the blocks are: the API server, or memory in tests.

use std::future::Future;

use ipnet::IpNet;
use mesh_api::status::Issue;

use crate::block::Block;

/// A block and the version it was read or written at.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stored {
    /// The block.
    pub block: Block,
    /// The object's `resourceVersion`.
    pub version: String,
}

/// Blocks as listed.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Listing {
    /// Those that could be read.
    pub blocks: Vec<Stored>,
    /// What is wrong with the others. Nobody touches them, and no block is made that overlaps them.
    pub issues: Vec<Issue>,
}

/// Which blocks to list.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scope<'a> {
    /// All of them.
    All,
    /// Those of one node: affine to it.
    Node(&'a str),
}

/// Why the store did not do it.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum StoreError {
    /// Another writer was first: the object is there already, or of another version.
    #[error("the object was changed by somebody else")]
    Conflict,
    /// There is no such object.
    #[error("the object does not exist")]
    NotFound,
    /// No answer. What was asked may have been done.
    #[error("{0}")]
    Unavailable(String),
    /// The answer is no (RBAC, admission, validation). Nothing was done.
    #[error("{0}")]
    Refused(String),
    /// The object is there and cannot be understood.
    #[error("{}: {}: {}", .0.object, .0.field, .0.message)]
    Unreadable(Box<Issue>),
}

/// A store of blocks with compare-and-swap.
///
/// Reads are of the newest state (in Kubernetes: no `resourceVersion` in the request), never of a cache that
/// may lag: an address is believed to be this node's on the strength of a read.
pub trait Store: Sync {
    /// The prefixes of all blocks, the unreadable ones' included: their names say them, so metadata suffice.
    fn prefixes(&self) -> impl Future<Output = Result<Vec<IpNet>, StoreError>> + Send;
    /// The blocks of a scope.
    fn list(&self, scope: Scope<'_>) -> impl Future<Output = Result<Listing, StoreError>> + Send;
    /// One block.
    fn get(&self, cidr: IpNet) -> impl Future<Output = Result<Stored, StoreError>> + Send;
    /// Makes a block; `Conflict` when there is one of its name.
    fn create(&self, block: &Block) -> impl Future<Output = Result<Stored, StoreError>> + Send;
    /// Replaces a block of this version.
    fn update(&self, block: &Block, version: &str)
    -> impl Future<Output = Result<Stored, StoreError>> + Send;
    /// Deletes a block of this version.
    fn delete(&self, cidr: IpNet, version: &str) -> impl Future<Output = Result<(), StoreError>> + Send;
}
