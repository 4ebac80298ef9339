//! What a mesh loses, and for how long, when its datapaths are upgraded or killed, when a pair of nodes cannot reach each
//! other, and when somebody sends what nobody should. Packets are counted, and status and metrics tell the same.
#![allow(clippy::unwrap_used, clippy::disallowed_methods)]

#[path = "../common/mod.rs"]
mod common;
mod heal;
mod hostile;
mod numbers;
mod support;
mod upgrade;
