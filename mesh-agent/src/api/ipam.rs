//! Addresses of IPPools: [`mesh_api::ipam`].

use std::net::IpAddr;

use axum::extract::{Query, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse as _, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use mesh_api::ipam::ReleaseRefused;
use serde::Deserialize;
use serde_json::json;

use super::{Api, refuse};
use crate::ipam::pools::Unanswered;

pub(super) const RELEASE: &str = "/v1/ipam/release";

/// For both sockets.
pub(super) fn reads() -> Router<Api> {
    Router::new().route("/v1/ipam", get(usage)).route("/v1/ipam/check", get(check))
}

/// For the control socket.
pub(super) fn writes() -> Router<Api> {
    Router::new().route(RELEASE, post(release))
}

#[derive(Deserialize)]
struct Which {
    ip: IpAddr,
}

impl Api {
    fn no_pools(&self) -> Response {
        answer(Unanswered::NotInUse)
    }
}

fn answer(error: Unanswered) -> Response {
    let status = match error {
        Unanswered::NotInUse => StatusCode::CONFLICT,
        Unanswered::Failed(_) => StatusCode::SERVICE_UNAVAILABLE,
    };
    refuse(status, error.to_string())
}

async fn usage(State(api): State<Api>) -> Response {
    let Some((pools, _)) = &api.pools else { return api.no_pools() };
    pools.usage().await.map_or_else(answer, |usage| Json(usage).into_response())
}

async fn check(State(api): State<Api>) -> Response {
    let Some((pools, server)) = &api.pools else { return api.no_pools() };
    pools.check(server).await.map_or_else(answer, |check| Json(check).into_response())
}

async fn release(State(api): State<Api>, Query(which): Query<Which>) -> Response {
    let Some((pools, server)) = &api.pools else { return api.no_pools() };
    match pools.release(server, which.ip).await {
        Ok(Ok(released)) => Json(released).into_response(),
        Ok(Err(ReleaseRefused { ip, reason })) => {
            let body = json!({"error": format!("{ip} is not freed: {reason}"), "ip": ip, "reason": reason});
            (StatusCode::CONFLICT, Json(body)).into_response()
        }
        Err(error) => answer(error),
    }
}
