//! Who is in the mesh: keys, announcements and their admission.
//!
//! `key` and `keyfile` hold this node's secret, `announcement` is what a node says of itself, `admission`
//! decides whom to believe, `publish` carries announcements to the others, `rotation` changes keys while packets flow.

pub mod admission;
pub mod announcement;
mod file;
pub mod key;
pub mod keyfile;
pub mod publish;
pub mod rotation;

pub use admission::{Admission, Admitted, Authority, Claim, Incumbents, Refusal};
pub use announcement::{Announcement, AnnouncementError, AnnouncementKey, KeyClaim, SigningKey};
pub use file::FileProblem;
pub use key::{KeyError, PresharedKey, PrivateKey, PublicKey};
