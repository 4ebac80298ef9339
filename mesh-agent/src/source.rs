//! Where state comes from. Each source writes what it knows into the [`crate::store::Store`].

pub mod assemble;
pub mod decode;
pub mod directory;
pub mod kubernetes;
pub mod manifest;
