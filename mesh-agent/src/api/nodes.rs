//! Orders about other nodes: whose announcements to believe.

use axum::extract::{Path, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse as _, Response};
use axum::routing::post;
use axum::{Json, Router};
use keyservice::Announcement;
use mesh_api::status::Trusted;

use super::{Api, refuse};

/// Believe what a node's announcement is signed with now.
pub(super) const TRUST: &str = "/v1/nodes/{name}/trust";

/// For the control socket.
pub(super) fn routes() -> Router<Api> {
    Router::new().route(TRUST, post(trust))
}

async fn trust(State(api): State<Api>, Path(name): Path<String>) -> Response {
    let snapshot = api.store.current();
    if !snapshot.cluster.mesh.first_use {
        let message = "spec.announcementTrust of the MeshConfiguration is not first-use: no key is pinned";
        return refuse(StatusCode::CONFLICT, message);
    }
    let Some(node) = snapshot.cluster.nodes.get(&name) else {
        return refuse(StatusCode::NOT_FOUND, format!("there is no Node {name}"));
    };
    let announced = match Announcement::from_annotations(&name, &node.annotations) {
        Ok(Some(announced)) => announced,
        Ok(None) => return refuse(StatusCode::CONFLICT, format!("Node {name} announces nothing")),
        Err(error) => return refuse(StatusCode::CONFLICT, format!("Node {name}: {error}")),
    };
    let Some(key) = announced.signer(node.uid.as_deref()) else {
        let message = format!("the announcement of Node {name} is not signed for it");
        return refuse(StatusCode::CONFLICT, message);
    };
    api.store.update_local(|local| {
        local.trusted.insert(name.clone(), key);
    });
    Json(Trusted { node: name, key: key.to_string() }).into_response()
}
