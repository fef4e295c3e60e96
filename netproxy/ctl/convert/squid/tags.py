"""Tags of squid.conf that need no setting, and those that cannot be carried, each with the reason.

A tag that is in no table here and has no reader elsewhere is unknown.
"""

from __future__ import annotations

_NO_CACHE = "netproxyd keeps no cache"
_MANAGED = "the service manager does this"
_OWN_LOG = "the log goes to standard error, which the service manager keeps"
_ERRORS = "errors are a line of text"
_NO_FIELDS = "netproxyd does not change the fields of messages"
_NO_TLS = "netproxyd opens no TLS of clients"
_NO_CONTENT = "netproxyd looks at no content"
_NO_ICP = "netproxyd asks no neighbours about objects"
_TUNED = "netproxyd has a fixed value that suits"

_UNNEEDED_WORDS = {
    _NO_CACHE: """
        cache_mem maximum_object_size_in_memory memory_cache_shared memory_cache_mode
        memory_replacement_policy cache_replacement_policy minimum_object_size maximum_object_size
        cache_dir store_dir_select_algorithm max_open_disk_fds cache_swap_low cache_swap_high
        cache_store_log cache_swap_state mime_table cache send_hit store_miss max_stale
        refresh_pattern quick_abort_min quick_abort_max quick_abort_pct read_ahead_gap
        negative_ttl range_offset_limit minimum_expiry_time store_avg_object_size
        store_objects_per_bucket vary_ignore_expire collapsed_forwarding
        collapsed_forwarding_access diskd_program shared_transient_entries_limit unlinkd_program
        store_id_program store_id_extras store_id_children store_id_access store_id_bypass
        cache_miss_revalidate refresh_all_ims reload_into_ims offline_mode digest_generation
        digest_bits_per_entry digest_rebuild_period digest_rewrite_period
        digest_swapout_chunk_size digest_rebuild_chunk_percentage memory_pools memory_pools_limit
        hopeless_kid_revival_delay shared_memory_locking cache_vary broken_vary_encoding
        update_headers ignore_ims_on_miss refresh_stale_hit
    """,
    _MANAGED: """
        pid_filename coredump_dir cache_effective_user cache_effective_group chroot umask
        logfile_rotate max_filedescriptors cpu_affinity_map sleep_after_fork
    """,
    _OWN_LOG: """
        cache_log debug_options logformat logfile_daemon buffered_logs log_mime_hdrs
        stats_collection strip_query_terms client_netmask emulate_httpd_log forward_log
        referer_log useragent_log log_fqdn
    """,
    _ERRORS: """
        error_directory error_default_language error_log_languages err_page_stylesheet
        err_html_text icon_directory global_internal_static short_icon_urls cache_mgr mail_from
        mail_program email_err_data httpd_suppress_version_string visible_hostname unique_hostname
        hostname_aliases
    """,
    _NO_ICP: """
        icp_port htcp_port icp_access htcp_access htcp_clr_access log_icp_queries icp_hit_stale
        minimum_direct_hops minimum_direct_rtt netdb_low netdb_high netdb_ping_period query_icmp
        test_reachability icp_query_timeout maximum_icp_query_timeout minimum_icp_query_timeout
        background_ping_rate mcast_groups mcast_miss_addr mcast_miss_ttl mcast_miss_port
        mcast_miss_encode_key mcast_icp_query_timeout udp_incoming_address udp_outgoing_address
        netdb_filename pinger_program pinger_enable announce_period announce_host announce_file
        announce_port
    """,
    _TUNED: """
        authenticate_cache_garbage_interval authenticate_ttl authenticate_ip_ttl dead_peer_timeout
        forward_max_tries request_header_max_size reply_header_max_size
        client_request_buffer_max_size forward_timeout write_timeout client_idle_pconn_timeout
        ftp_client_idle_timeout pconn_lifetime server_idle_pconn_timeout ident_timeout
        half_closed_clients connect_retries client_persistent_connections
        server_persistent_connections retry_on_error persistent_connection_after_error
        detect_broken_pconn pipeline_prefetch accept_filter incoming_udp_average
        incoming_tcp_average incoming_dns_average min_udp_poll_cnt min_dns_poll_cnt
        min_tcp_poll_cnt tcp_recv_bufsize check_hostnames allow_underscore dns_retransmit_interval
        dns_timeout dns_packet_max dns_defnames dns_multicast_local hosts_file
        ignore_unknown_nameservers ipcache_size ipcache_low ipcache_high fqdncache_size
        positive_dns_ttl negative_dns_ttl client_db relaxed_header_parser broken_posts
        high_response_time_warning high_page_fault_warning high_memory_warning
        force_request_body_continuation server_pconn_for_nonretriable
        happy_eyeballs_connect_timeout happy_eyeballs_connect_gap happy_eyeballs_connect_limit
        configuration_includes_quoted_values dns_v4_fallback balance_on_multiple_ip
        maximum_single_addr_tries chunked_request_body_max_size windows_ipaddrchangemonitor
        eui_lookup uri_whitespace as_whois_server request_entities
    """,
    "the statistics are netproxyctl status and /metrics": "snmp_port snmp_access cachemgr_passwd "
    "snmp_incoming_address snmp_outgoing_address",
    "netproxyd speaks no FTP": "ftp_user ftp_passive ftp_epsv_all ftp_epsv ftp_eprt "
    "ftp_sanitycheck ftp_telnet_protocol ftp_list_width",
}
_LOST_WORDS = {
    _NO_FIELDS: """
        request_header_access reply_header_access request_header_replace reply_header_replace
        request_header_add reply_header_add header_access follow_x_forwarded_for
        httpd_accel_surrogate_id http_accel_surrogate_remote
    """,
    _NO_TLS: "ssl_bump sslproxy_cert_error tls_outgoing_options sslproxy_cafile sslproxy_capath "
    "sslproxy_client_certificate sslproxy_client_key sslproxy_flags",
    _NO_CONTENT: """
        icap_enable icap_service icap_class icap_access ecap_enable ecap_service loadable_modules
        adaptation_service_set adaptation_service_chain adaptation_access adapted_http_access
        reply_body_max_size request_body_max_size http_upgrade_request_protocols
    """,
    "netproxyd rewrites no URLs": "url_rewrite_program url_rewrite_access location_rewrite_program",
    "netproxyd sets no TOS": "tcp_outgoing_tos clientside_tos qos_flows mark_client_packet "
    "mark_client_connection zph_local",
    "logins are checked by name and password": "external_acl_type ident_lookup_access auth_schemes",
    "netproxyd speaks no WCCP": "wccp_router wccp2_router wccp2_service",
    "netproxyd speaks no FTP": "ftp_port",
    "has no counterpart": """
        client_lifetime append_domain host_verify_strict client_dst_passthru spoof_client_ip
        on_unsupported_protocol note deny_info miss_access neighbor_type_domain
        response_delay_pool response_delay_pool_access client_delay_access extension_methods
        error_map hierarchy_stoplist
    """,
}
_PARTS = {
    ("follow_x_forwarded_for",): """
        acl_uses_indirect_client delay_pool_uses_indirect_client log_uses_indirect_client
        tproxy_uses_indirect_client adaptation_uses_indirect_client
    """,
    ("ssl_bump",): """
        sslcrtd_program sslcrtd_children sslcrtvalidator_program sslcrtvalidator_children
        sslproxy_cert_sign sslproxy_cert_adapt sslpassword_program ssl_engine sslproxy_session_ttl
        sslproxy_session_cache_size sslproxy_foreign_intermediate_certs sslproxy_cert_sign_hash
        ssl_unclean_shutdown sslproxy_cipher sslproxy_options sslproxy_version
    """,
    ("icap_service", "ecap_service"): """
        icap_connect_timeout icap_io_timeout icap_service_failure_limit icap_service_revival_delay
        icap_preview_enable icap_preview_size icap_206_enable icap_default_options_ttl
        icap_persistent_connections adaptation_send_client_ip adaptation_send_username
        icap_client_username_header icap_client_username_encode icap_log icap_retry
        icap_retry_limit adaptation_service_iteration_limit adaptation_masterx_shared_names
        adaptation_meta esi_parser
    """,
    ("url_rewrite_program",): "url_rewrite_children url_rewrite_host_header url_rewrite_bypass "
    "url_rewrite_extras url_rewrite_timeout",
    ("wccp_router", "wccp2_router"): """
        wccp_version wccp2_rebuild_wait wccp2_forwarding_method wccp2_return_method
        wccp2_assignment_method wccp2_service_info wccp2_weight wccp_address wccp2_address
    """,
    ("delay_class",): "delay_initial_bucket_level",
    ("client_delay_access",): "client_delay_pools client_delay_initial_bucket_level "
    "client_delay_parameters",
}
"""Tags that tune a part of squid, by the tags without which it is not used."""


def _by_tag(words: dict[str, str]) -> dict[str, str]:
    return {tag: reason for reason, tags in words.items() for tag in tags.split()}


UNNEEDED = _by_tag(_UNNEEDED_WORDS)
"""Tags and why they need no setting."""
LOST = _by_tag(_LOST_WORDS)
"""Tags and why they cannot be carried."""
PARTS = {tag: users for users, tags in _PARTS.items() for tag in tags.split()}
"""Tags that tune a part of squid, and the tags of which one uses it."""
