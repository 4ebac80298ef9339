//! Why a request failed, in CNI's numbers (specification, section 5).

use mesh_api::cni::Reply;

use crate::ipam::IpamError;
use crate::reconcile::ReconcileError;

/// A failure and its number.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub(super) struct Refusal {
    pub(super) code: u32,
    message: String,
}

impl Refusal {
    fn new(code: u32, message: impl Into<String>) -> Self {
        Self { code, message: message.into() }
    }

    /// 3: the container is not known here.
    pub(super) fn unknown(message: impl Into<String>) -> Self {
        Self::new(3, message)
    }

    /// 4: an environment variable.
    pub(super) fn environment(message: impl Into<String>) -> Self {
        Self::new(4, message)
    }

    /// 5: the system said no.
    pub(super) fn io(message: impl Into<String>) -> Self {
        Self::new(5, message)
    }

    /// 6: not understood.
    pub(super) fn decode(message: impl Into<String>) -> Self {
        Self::new(6, message)
    }

    /// 7: the configuration.
    pub(super) fn config(message: impl Into<String>) -> Self {
        Self::new(7, message)
    }

    /// 11: it may work later.
    pub(super) fn try_again(message: impl Into<String>) -> Self {
        Self::new(11, message)
    }

    /// 50: no ADD is possible.
    pub(super) fn unavailable(message: impl Into<String>) -> Self {
        Self::new(50, message)
    }

    /// 51: no ADD is possible, and pods that are there may be cut off.
    pub(super) fn limited(message: impl Into<String>) -> Self {
        Self::new(51, message)
    }

    /// Ours, 100: this container and interface have an attachment already, and a different one.
    pub(super) fn exists(message: impl Into<String>) -> Self {
        Self::new(100, message)
    }

    /// Ours, 101: an interface is not as ADD left it.
    pub(super) fn differs(message: impl Into<String>) -> Self {
        Self::new(101, message)
    }

    pub(super) fn into_reply(self) -> Reply {
        Reply::Failed { code: self.code, message: self.message, details: String::new() }
    }
}

impl From<ReconcileError> for Refusal {
    fn from(error: ReconcileError) -> Self {
        Self::io(error.to_string())
    }
}

impl From<IpamError> for Refusal {
    fn from(error: IpamError) -> Self {
        let text = error.to_string();
        match error {
            IpamError::NotInPool(_) | IpamError::Reserved(_) | IpamError::TwoOfFamily(..) => {
                Self::config(text)
            }
            IpamError::Journal(_) => Self::io(text),
            IpamError::NoCidr
            | IpamError::Exhausted(_)
            | IpamError::InUse(..)
            | IpamError::UnknownInterface(_)
            | IpamError::NameTaken(..) => Self::try_again(text),
        }
    }
}
